"""The engine core: one loop that launches step k and then finishes step k-1. Knows the scheduler and the runner."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import IO

from jaxserve.engine.counts import Counts
from jaxserve.engine.executables import compile_counter
from jaxserve.engine.finish import finish_step
from jaxserve.engine.inbox import Inbox, Message
from jaxserve.engine.moved import Moved, Transferred
from jaxserve.engine.pace import Pace
from jaxserve.engine.programs import ProgramSet
from jaxserve.engine.runner import Launched, Runner
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.transfer import Transfer
from jaxserve.engine.turns import Turns
from jaxserve.scheduler import Scheduler
from jaxserve.types import (
    Abort,
    Arrive,
    Cancel,
    CloseProgram,
    CostUpdate,
    Delta,
    Deltas,
    ExportPrefix,
    FinishReason,
    FromCore,
    ImportPrefix,
    ModelLimits,
    MoveDone,
    Prefix,
    Ready,
    Request,
    ResetCache,
    SeqId,
    Stats,
    StepDone,
    Submit,
    SubmitAll,
    Tick,
)

log = logging.getLogger(__name__)

INTEGRITY_EVERY_S = 5.0
"""An idle engine checks its page accounting at most this often."""

POLICY_ERROR_EVERY_S = 10.0


class EngineCore:
    """Serves requests from `inbox`, answers through `emit`. Everything runs on the thread that calls `run`."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        programs: ProgramSet,
        ready: Ready,
        identity: str,
        inbox: Inbox,
        emit: Callable[[FromCore], None],
        prefix_caching: bool,
        transfer: Transfer | None = None,
        record: IO[bytes] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._scheduler = scheduler
        self._runner = runner
        self._programs = programs
        self._ready = ready
        self._limits: ModelLimits = ready.limits
        self._identity = identity
        self._inbox = inbox
        self._emit = emit
        self._prefix_caching = prefix_caching
        self._transfer = transfer
        self._record = record
        self._clock = clock
        self._sequences: dict[SeqId, Sequence] = {}
        self._requests: dict[str, list[Sequence]] = {}
        self._turns = Turns(scheduler.pinned)
        self._next_seq = 0
        self._in_flight: Launched | None = None
        self._deltas: list[Delta] = []
        self._stopping = False
        self._checked = 0.0
        self._steps_time = 0.0
        self._counts = Counts()
        self._pace = Pace(ready.page_tokens)
        self._policy_error: Exception | None = None
        self._policy_silent_until = 0.0

    @property
    def ready(self) -> Ready:
        """What this core serves; the first thing that `run` says."""
        return self._ready

    # The loop

    def run(self) -> None:
        """Serves until a front end says shutdown."""
        self._emit(self._ready)
        while not self._stopping:
            if not self.step():
                self._idle()
        self.close()

    def close(self) -> None:
        """Stops compiling and moving, and completes the record. The core serves no more."""
        self._programs.close()
        self._runner.close()
        if self._transfer is not None:
            self._transfer.close()
        if self._record is not None:
            self._record.close()

    def step(self) -> bool:
        """Starts step k on the device, finishes step k-1 meanwhile. False when there was nothing to do."""
        with compile_counter.watching():
            return self._step()

    def _step(self) -> bool:
        for message in self._inbox.drain():
            self._on_message(message)
        now = self._clock()
        self._scheduler.on_event(Tick(now=now))
        plan = self._scheduler.plan()
        if self._scheduler.policy_error is not self._policy_error:
            self._say_policy_error(now)
        if plan.moves:
            self._runner.start_moves(plan.moves)
        if plan.landings:
            assert self._transfer is not None
            for answer in self._transfer.land(plan):
                self._emit(answer)
        launched = None
        if plan.has_work:
            for admit in plan.admits:
                self._admitted(self._sequences[admit.seq], now, admit.cached)
            launched = self._runner.launch(plan, self._sequences, now)
        worked = launched is not None or self._in_flight is not None
        if self._in_flight is not None:
            self._finish(self._in_flight)
        self._in_flight = launched
        if self._deltas:
            self._emit(Deltas(deltas=tuple(self._deltas)))
            self._deltas = []
        transfers = 0 if self._transfer is None else self._transfer.under_way
        if not worked and (self._scheduler.moves_under_way or transfers):
            self._inbox.wait(0.05)
            return True
        return worked

    def settle(self) -> None:
        """Waits until the device has computed all that was launched. Between two steps only."""
        self._runner.settle()

    def _say_policy_error(self, now: float) -> None:
        """A policy that fails once may fail at every step: the metric counts, the log says it now and then."""
        self._policy_error = error = self._scheduler.policy_error
        if now >= self._policy_silent_until:
            self._policy_silent_until = now + POLICY_ERROR_EVERY_S
            log.error(
                "the scheduling policy failed (%d times so far); that step went by order of arrival",
                self._scheduler.counters["policy_errors"],
                exc_info=error,
            )

    def _finish(self, launched: Launched) -> None:
        outcome = finish_step(launched, self._sequences, self._counts.totals)
        now = self._clock()
        # Steps overlap: what a step took is the time since it started or since the one before it ended.
        duration = now - max(launched.started, self._steps_time)
        self._steps_time = now
        self._counts.step(launched.tokens, launched.places)
        self._scheduler.on_event(StepDone(now=now, step=launched.plan.step, duration=duration, results=outcome.results))
        rates = self._pace.add(launched.plan, duration)
        if rates is not None:
            self._scheduler.on_event(CostUpdate(now=now, values=rates))
        self._deltas.extend(outcome.deltas)
        for sequence in outcome.finished:
            self._forget(sequence)

    def _admitted(self, sequence: Sequence, now: float, cached: int) -> None:
        """It has a slot. Only the first time counts: a preempted sequence comes here again."""
        if sequence.first_scheduled is None:
            sequence.first_scheduled, sequence.cached_tokens = now, cached
            self._counts.totals["prompt_tokens_cached"] += cached if sequence.choice == 0 else 0

    def _idle(self) -> None:
        now = self._clock()
        if not self._sequences and now - self._checked > INTEGRITY_EVERY_S:
            self._scheduler.check_integrity()
            self._checked = now
        wake = self._scheduler.next_wake
        self._inbox.wait(1.0 if wake is None else max(0.0, min(1.0, wake - now)))

    # Messages

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Moved):
            self._runner.finish_move(message)
            self._scheduler.on_event(MoveDone(now=self._clock(), move=message.move.id))
        elif isinstance(message, Submit):
            self._take(message.request)
        elif isinstance(message, SubmitAll):
            for request in message.requests:
                self._take(request)
        elif isinstance(message, Cancel):
            for name in message.ids:
                self._cancel(name)
        elif isinstance(message, ExportPrefix | ImportPrefix | Transferred):
            self._move_prefix(message)
        elif message.verb == "shutdown":
            self._stopping = True
        else:
            if message.verb == "reset_prefix_cache":
                self._scheduler.on_event(ResetCache(now=self._clock()))
            elif message.verb == "close_program":
                self._scheduler.on_event(CloseProgram(now=self._clock(), program=message.program))
            self._emit(self._stats(message.token))

    def _move_prefix(self, message: ExportPrefix | ImportPrefix | Transferred) -> None:
        try:
            if self._transfer is None:
                raise ValueError("this engine exports and imports no KV: start it with --kv-transfer")
            if isinstance(message, ExportPrefix):
                self._transfer.export(message)
            elif isinstance(message, ImportPrefix):
                self._transfer.check(message)
            else:
                answer = self._transfer.hear(message, self._clock())
                if answer is not None:
                    self._emit(answer)
        except Exception as error:  # no more than a request may it hurt another
            if not isinstance(error, ValueError):
                log.exception("moving a prefix failed")
            self._emit(Prefix(token=message.token, error=str(error)))

    def _take(self, request: Request) -> None:
        try:
            self._submit(request)
        except Exception as error:  # one request cannot hurt another
            if not isinstance(error, ValueError):
                log.exception("request %s failed at admission", request.id)
            self._refuse(request, str(error))

    def _submit(self, request: Request) -> None:
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is in use")
        self._check(request)
        now = self._clock()
        params = request.params
        eos = () if params.ignore_eos else self._limits.eos_token_ids
        stops = frozenset({*eos, *params.stop_token_ids})
        max_new = min(params.max_tokens or 0, self._limits.max_model_len - len(request.prompt))
        sequences, parent = [], None
        for choice in range(params.n):
            seq = self._next_seq + choice
            sequences.append(
                Sequence(
                    seq=seq,
                    request=request,
                    choice=choice,
                    tokens=list(request.prompt),
                    eos=eos,
                    stops=stops,
                    max_new=max_new,
                    arrived=now,
                    page_tokens=self._ready.page_tokens,
                )
            )
        first = sequences[0]
        whole = params.prompt_logprobs is not None
        if whole:
            first.prompt_logprobs = [None]
        hashes = first.start_chain(self._identity) if self._prefix_caching else ()
        for sequence in sequences[1:]:
            sequence.root, sequence.chain = first.root, list(first.chain)
        shared = self._turns.shared(first.program, request.prompt) if first.program and not whole else 0
        arrivals = []
        for sequence in sequences:
            arrivals.append(
                Arrive(
                    now=now,
                    seq=sequence.seq,
                    prompt=sequence.prompt,
                    max_new=max(1, max_new),
                    hashes=hashes,
                    parent=parent,
                    priority=request.priority,
                    tenant=request.tenant,
                    whole_prompt=whole and parent is None,
                    program=sequence.program,
                    last_turn=request.last_turn,
                    tool=request.tool,
                    shared=shared,
                    deadline=None if request.deadline_s is None else now + request.deadline_s,
                )
            )
            parent = first.seq
        reason = self._scheduler.can_ever_fit(arrivals[0])
        if reason is not None:
            raise ValueError(reason)
        self._next_seq += params.n
        self._requests[request.id] = sequences
        self._counts.totals["prompt_tokens"] += len(request.prompt)
        for sequence, arrival in zip(sequences, arrivals, strict=True):
            self._sequences[sequence.seq] = sequence
            self._scheduler.on_event(arrival)

    def _check(self, request: Request) -> None:
        """Front ends validate with better words; this is what the device must never see."""
        prompt, limits = request.prompt, self._limits
        if not prompt:
            raise ValueError("the prompt has no tokens")
        if len(prompt) >= limits.max_model_len + (request.params.max_tokens == 0):
            raise ValueError(f"the prompt has {len(prompt)} tokens, which leaves no room below {limits.max_model_len}")
        if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
            raise ValueError(f"prompt token ids must lie between 0 and {limits.vocab_size - 1}")
        if request.params.max_tokens is None or request.params.seed is None:
            raise ValueError("max_tokens and seed must be set when a request is submitted")
        if not 1 <= request.params.n <= limits.max_choices:
            raise ValueError(f"n {request.params.n} must lie between 1 and {limits.max_choices}")
        if request.program_id and request.params.n != 1:
            raise ValueError(f"a turn of a program has one choice, not n {request.params.n}")
        self._runner.check(request)

    def _refuse(self, request: Request, why: str) -> None:
        for choice in range(max(1, min(request.params.n, self._limits.max_choices))):
            self._deltas.append(
                Delta(id=request.id, choice=choice, tokens=(), finish=FinishReason.ERROR, error=why, refused=True)
            )

    def _cancel(self, name: str) -> None:
        """`name`: a request id, or `id/choice`."""
        sequences = self._requests.get(name)
        if sequences is None:
            base, _, choice = name.rpartition("/")
            sequences = [s for s in self._requests.get(base, ()) if str(s.choice) == choice]
        for sequence in list(sequences):
            self._scheduler.on_event(Abort(now=self._clock(), seq=sequence.seq))
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._sequences.pop(sequence.seq, None)
        if sequence.program and sequence.finish is not FinishReason.ERROR:
            self._turns.ended(sequence.program, sequence.seq, sequence.tokens)
        siblings = self._requests.get(sequence.request.id)
        if siblings is not None and sequence in siblings:
            siblings.remove(sequence)
            if not siblings:
                del self._requests[sequence.request.id]

    def _stats(self, token: int) -> Stats:
        counters = {
            **self._scheduler.counters,
            **self._counts.read(),
            "swap_copies": self._runner.host_copies,
            "undeclared_compilations": compile_counter.undeclared,
            "programs_compiled": self._programs.compiled,
            "programs_loaded": self._programs.loaded,
        }
        gauges = {**self._scheduler.gauges, "programs_pending": self._programs.pending}
        return Stats(counters=counters, gauges=gauges, token=token)
