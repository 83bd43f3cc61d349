"""One engine in virtual time: the real scheduler, its page accounting and planning lag, and a device that takes as long
as the cost model says. Knows no trace and no other replica."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import BinaryIO, NamedTuple

from msgspec import structs

from jaxserve.engine.pace import Pace
from jaxserve.scheduler import Policy, Recorder, Scheduler
from jaxserve.sim.clock import Agenda
from jaxserve.sim.cost import Features, features
from jaxserve.sim.machine import Machine
from jaxserve.sim.metrics import Gaps, Served
from jaxserve.sim.workload import Job, Turn, common_tokens, page_names
from jaxserve.types import (
    PAGE_TOKENS,
    Abort,
    Arrive,
    CostUpdate,
    Move,
    MoveDone,
    Plan,
    SeqId,
    SeqResult,
    StepDone,
    Tick,
)

SHORTEST_NAP_S = 1e-4
"""A policy that wants to be asked again at once is asked that much later: virtual time must pass."""


class Call:
    """A turn on its way through a replica. `left`: tokens that it will still generate."""

    __slots__ = ("arrive", "hashed", "job", "last", "left", "names_answer", "notable", "plain", "seq", "served", "turn")

    def __init__(self, arrive: Arrive, job: Job, turn: Turn, served: Served) -> None:
        self.seq = arrive.seq
        self.arrive = arrive
        """What a scheduler is told of it, but for the time and what is known when it is told."""
        self.job = job
        self.turn = turn
        self.served = served
        self.left = turn.output
        self.last = math.nan
        """When its newest token came."""
        self.plain = SeqResult(arrive.seq, 1, False)
        """What every step says of it in which nothing but a token happens."""
        self.hashed = turn.prompt // PAGE_TOKENS
        """Leading pages that have been named to the scheduler."""
        self.notable = 0
        """Next value of `left` with which more happens than a token: the end, or a full page, which gets a name."""

    @property
    def length(self) -> int:
        """Tokens known so far."""
        return self.turn.prompt + self.turn.output - self.left

    def names(self, first: int, end: int) -> tuple[bytes, ...]:
        """Every page has a name, as in the engine: also those that nobody will ask for stay cached when the call ends,
        and what others left behind is evicted before them if it is older."""
        names = page_names(self.turn, self.job.copy, first, end) if self.turn.spans else ()
        return names + tuple([b"%d/%d" % (self.seq, page) for page in range(first + len(names), end)])

    def watch(self, named: bool) -> None:
        """Sets `notable`. `named`: whether pages get names. A page's KV is complete when the token after its last one
        is known."""
        reach = (self.hashed + 1) * PAGE_TOKENS + 1
        self.notable = max(0, self.turn.prompt + self.turn.output - reach) if named else 0


class Launched(NamedTuple):
    plan: Plan
    started: float
    end: float


class Sample(NamedTuple):
    """The state of a replica at some time."""

    now: float
    running: int
    waiting: int
    kv_usage: float
    tokens: int
    """Generated so far."""


class Replica:
    """Plans step k+1 while step k computes, like engine/core.py: at most one step is launched and unfinished when the
    next is planned. `finished` is told of every call that ends."""

    def __init__(
        self,
        agenda: Agenda,
        machine: Machine,
        policy: Policy,
        finished: Callable[[Call], None],
        record: BinaryIO | None = None,
        sample_every: float = math.inf,
    ) -> None:
        self.machine = machine
        self.scheduler = Scheduler(policy, machine.limits, machine.groups, Recorder(record) if record else None)
        self.calls: dict[SeqId, Call] = {}
        self.gaps = Gaps()
        self.steady = Gaps()
        """Of these, the ones between tokens of consecutive steps: others made the sequence wait, not its absence."""
        self.samples: list[Sample] = []
        self.steps = 0
        self.busy_s = 0.0
        self.copies = 0
        """Between device and host memory."""
        self._agenda = agenda
        self._inbox: deque[Call | SeqId | Move] = deque()
        self._turns: dict[str, Call] = {}
        """The last turn that ended here, by program."""
        self._asleep = True
        self._naps = 0
        self._link_free: dict[str, float] = {}
        """When the link to host memory is free again, by direction."""
        self._finished = finished
        self._sample_every = sample_every
        self._sampled = -math.inf
        self._launched: Features | None = None
        self._in_flight: Launched | None = None
        self._awaited: Launched | None = None
        self._device_free = 0.0
        self._step_ended = 0.0
        self._tokens = 0
        self._shape = machine.shape
        self._cost = machine.cost
        self._named = machine.limits.enable_prefix_caching
        self._pace = Pace(PAGE_TOKENS)
        self.scheduler.on_event(CostUpdate(now=agenda.now, values=self._cost.parameters()))

    @property
    def load(self) -> int:
        """Calls here that have not ended."""
        return len(self.calls) + len(self._inbox)

    def submit(self, call: Call) -> None:
        self._put(call)

    def abort(self, seq: SeqId) -> None:
        """The client of a call has gone. Nothing happens if the call has ended."""
        self._put(seq)

    def _put(self, item: Call | SeqId | Move) -> None:
        self._inbox.append(item)
        if self._asleep:
            self._asleep = False
            self._agenda.at(self._agenda.now, self._advance)

    # The loop

    def _advance(self, now: float) -> float | None:
        """What the engine's loop does from `now` until it must wait. Returns until when; None: for the inbox."""
        if self._awaited is not None:
            self._finish(self._awaited, now)
            self._awaited = None
        if self._inbox:
            self._drain(now)
        self.scheduler.on_event(Tick(now=now))
        plan = self.scheduler.plan()
        before, self._in_flight = self._in_flight, None
        for move in plan.moves:
            self._start(move, now)
        if plan.has_work:
            self._in_flight = self._launch(plan, now, alone=before is None)
        if now - self._sampled >= self._sample_every:
            self._sample(now)
        if before is None and self._in_flight is not None:
            if self.machine.limits.lag:
                return now + self.machine.host_s
            before, self._in_flight = self._in_flight, None
        if before is not None:
            self._awaited = before
            return max(now, before.end)
        self._rest(now)
        return None

    def _rest(self, now: float) -> None:
        """Sleeps until something arrives, or the policy wants to be asked again."""
        self._asleep = True
        self._naps += 1
        wake = self.scheduler.next_wake
        if wake is not None:
            self._agenda.at(max(wake, now + SHORTEST_NAP_S), partial(self._alarm, self._naps))

    def _alarm(self, nap: int, now: float) -> None:
        if self._asleep and nap == self._naps:
            self._asleep = False
            self._agenda.at(now, self._advance)

    def _drain(self, now: float) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Call):
                self.calls[item.seq] = item
                self.scheduler.on_event(self._arrive(item, now))
            elif isinstance(item, Move):
                self.scheduler.on_event(MoveDone(now=now, move=item.id))
            elif item in self.calls:
                self.scheduler.on_event(Abort(now=now, seq=item))
                self._end(self.calls[item], now, aborted=True)

    def _arrive(self, call: Call, now: float) -> Arrive:
        names = call.names(0, call.hashed) if self._named else ()
        call.watch(self._named)
        return structs.replace(call.arrive, now=now, hashes=names, shared=self._shared(call))

    def _shared(self, call: Call) -> int:
        """Leading tokens of a turn that are those of the turn whose pages its program holds here."""
        program = call.arrive.program
        before = self._turns.get(program)
        if before is None or self.scheduler.pinned(program) != before.seq:
            return 0
        return common_tokens(before.turn.spans, call.turn.spans, min(before.length, call.turn.prompt))

    def _end(self, call: Call, now: float, aborted: bool = False) -> None:
        del self.calls[call.seq]
        served = call.served
        served.output, served.finish, served.aborted = call.turn.output - call.left, now, aborted
        if call.arrive.program:
            if served.last_turn:
                self._turns.pop(call.arrive.program, None)
            else:
                self._turns[call.arrive.program] = call
        self._finished(call)

    # Moves

    def _start(self, move: Move, now: float) -> None:
        """Moves of one direction follow each other on the link."""
        link, pages = self.machine.link, len(move.pages)
        page_bytes = self.machine.groups[move.group].classes[move.cls].bytes
        begin = max(now, self._link_free.get(move.kind, 0.0))
        end = begin + link.seconds(pages, page_bytes, self.machine.limits.host_link_bytes_s)
        self._link_free[move.kind] = end
        self.copies += link.copies(pages)
        if not link.overlaps:
            self._device_free = max(self._device_free, end)
        self._agenda.at(end, partial(self._moved, move))

    def _moved(self, move: Move, now: float) -> None:
        self._put(move)

    # A step

    def _launch(self, plan: Plan, now: float, alone: bool) -> Launched:
        for admit in plan.admits:
            call = self.calls[admit.seq]
            served = call.served
            if served.preemptions:
                served.recomputed += call.length - admit.cached
            else:
                served.started, served.cached = now, admit.cached
        for seq in plan.preempted:
            self.calls[seq].served.preemptions += 1
        started = max(now, self._device_free)
        self._launched = step = features(plan, self._shape, self._launched, alone)
        took = self._cost.step_s(step)
        self._device_free = end = started + took
        self.busy_s += took
        self.steps += 1
        return Launched(plan, started, end)

    def _finish(self, launched: Launched, now: float) -> None:
        plan, calls, before = launched.plan, self.calls, self._step_ended
        results: list[SeqResult] = []
        append = results.append
        steady = 0
        for work in plan.decode:
            call = calls.get(work.seq)
            if call is None:
                continue
            call.left = left = call.left - 1
            if call.last == before:
                steady += 1
            else:
                self.gaps.add(now - call.last)
            call.last = now
            append(call.plain if left > call.notable else self._note(call, now))
        self._tokens += len(results)
        if steady:
            self.gaps.add(now - before, steady)
            self.steady.add(now - before, steady)
        for work in plan.prefill:
            if work.samples and work.seq in calls:
                append(self._first(calls[work.seq], now))
        duration = now - max(launched.started, before)
        self._step_ended = now
        self.scheduler.on_event(StepDone(now=now, step=plan.step, duration=duration, results=tuple(results)))
        rates = self._pace.add(plan, duration)
        if rates is not None:
            self.scheduler.on_event(CostUpdate(now=now, values=rates))

    def _first(self, call: Call, now: float) -> SeqResult:
        """The token that the last tile of a prompt gives: the first of all, or the first after a preemption."""
        call.left -= 1
        self._tokens += 1
        if call.last == call.last:
            self.gaps.add(now - call.last)
        else:
            call.served.first = now
        call.last = now
        return call.plain if call.left > call.notable else self._note(call, now)

    def _note(self, call: Call, now: float) -> SeqResult:
        """A token with which a page is full or the call ends."""
        names: tuple[bytes, ...] = ()
        full = (call.length - 1) // PAGE_TOKENS
        if self._named and full > call.hashed:
            names = call.names(call.hashed, full)
            call.hashed = full
            call.watch(True)
        ends = call.left == 0
        if ends:
            self._end(call, now)
        return SeqResult(call.seq, 1, ends, names)

    def _sample(self, now: float) -> None:
        self._sampled = now
        gauges = self.scheduler.gauges
        self.samples.append(
            Sample(
                now,
                int(gauges["num_requests_running"]),
                int(gauges["num_requests_waiting"]),
                gauges["kv_cache_usage_perc"],
                self._tokens,
            )
        )
