"""The scheduler: one ordered stream of events in, plans out. Knows no device, clock, randomness or I/O.

Time comes with the events, so replaying a recorded stream restores any state and gives the same plans, byte for byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from jaxserve.scheduler.guard import Guard
from jaxserve.scheduler.kept import forget, keep
from jaxserve.scheduler.limits import Limits
from jaxserve.scheduler.pages import Pages
from jaxserve.scheduler.plan import build_plan
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.programs import Programs
from jaxserve.scheduler.request import DECODE, NO_SLOT, Seq
from jaxserve.scheduler.roster import Roster
from jaxserve.scheduler.swap import Swap
from jaxserve.scheduler.view import View
from jaxserve.types import (
    Abort,
    Arrive,
    CloseProgram,
    CostUpdate,
    Event,
    Landing,
    MoveDone,
    PageClasses,
    PagesCame,
    Plan,
    ResetCache,
    SeqId,
    StepDone,
    Tick,
)


class EventRecorder(Protocol):
    """Gets everything that goes in and comes out, in order."""

    def header(self, policy: Policy, limits: Limits, groups: tuple[PageClasses, ...]) -> None: ...
    def event(self, event: Event) -> None: ...
    def plan(self, plan: Plan) -> None: ...


class Launched(NamedTuple):
    """A step whose StepDone is outstanding. `firsts`: sequences whose last prompt tile it has: one token each."""

    step: int
    rows: int
    firsts: frozenset[SeqId]
    plan: Plan


class Scheduler:
    """Decides what each step computes and which pages it uses.

    Per step the engine calls `on_event` for what has happened, then `plan`. Every plan with work is launched, in order,
    and answered by one StepDone with a result for each row that sampled and whose sequence was not aborted. At most
    `limits.lag` steps are launched and unanswered when `plan` is called. A plan without work changes nothing and is
    not answered.
    """

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        groups: tuple[PageClasses, ...],
        recorder: EventRecorder | None = None,
    ) -> None:
        """
        Raises:
            ValueError: a KV group that this scheduler cannot account for.
        """
        self.policy = policy
        self._guard = Guard(policy)
        self.limits = limits
        self.groups = groups
        self._pages = Pages(groups, limits)
        self._programs = Programs(self._pages, limits)
        self._swap = Swap(self._pages, groups, limits)
        self._roster = Roster(limits.max_num_seqs)
        self.view = View(self._roster, self._pages, self._programs, limits, groups)
        self._recorder = recorder
        self._in_flight: deque[Launched] = deque()
        self._landings: list[Landing] = []
        self._arrivals = 0
        self._preemptions = 0
        self._prefilled = 0
        self._tiles = 0
        self._rows = 0
        if recorder is not None:
            recorder.header(policy, limits, groups)

    # In

    def can_ever_fit(self, arrive: Arrive) -> str | None:
        """Why the sequence must be refused (it could not run even alone), or None."""
        if arrive.prompt < 1 or arrive.max_new < 1:
            return f"prompt ({arrive.prompt} tokens) and max_tokens ({arrive.max_new}) must both be at least 1"
        if arrive.prompt > self.limits.max_model_len:
            return f"the prompt has {arrive.prompt} tokens, more than the model length of {self.limits.max_model_len}"
        return self._pages.too_large(arrive.prompt, arrive.max_new)

    def on_event(self, event: Event) -> None:
        """Takes the next event.

        Raises:
            ValueError: it contradicts what came before, or a sequence arrives that `can_ever_fit` refuses.
        """
        if self._recorder is not None:
            self._recorder.event(event)
        self.view.now = event.now
        match event:
            case StepDone():
                self._step_done(event)
            case Arrive():
                self._arrive(event)
            case Abort(seq=seq):
                if seq in self._roster.seqs:
                    self._remove(self._roster.seqs[seq])
            case ResetCache():
                self._programs.reset()
                self._swap.reset()
                self._pages.reset_cache()
            case CloseProgram(program=program):
                self._programs.release(program)
            case CostUpdate(values=values):
                self.view.cost = {**self.view.cost, **values}
            case MoveDone(move=move):
                self._moved(move)
            case Tick():
                self._programs.expire(event.now)
            case PagesCame():
                self._land(event)
        self._guard.on_event(event, self.view)

    def _arrive(self, arrive: Arrive) -> None:
        if arrive.seq in self._roster.seqs:
            raise ValueError(f"sequence {arrive.seq} arrives a second time")
        reason = self.can_ever_fit(arrive)
        if reason is not None:
            raise ValueError(f"sequence {arrive.seq}: {reason}")
        if len(arrive.hashes) > arrive.prompt // self.limits.page_tokens:
            raise ValueError(
                f"sequence {arrive.seq} has {len(arrive.hashes)} page hashes, but a prompt of {arrive.prompt} tokens "
                f"has {arrive.prompt // self.limits.page_tokens} full pages"
            )
        parent = self._roster.seqs.get(arrive.parent) if arrive.parent is not None else None
        if parent is not None and parent.prompt != arrive.prompt:
            raise ValueError(
                f"sequence {arrive.seq} (prompt of {arrive.prompt} tokens) cannot share the prompt of its parent "
                f"{parent.id} ({parent.prompt} tokens)"
            )
        pin = self._programs.get(arrive.program)
        if arrive.shared and (pin is None or not 0 < arrive.shared <= arrive.prompt):
            raise ValueError(
                f"sequence {arrive.seq} shares {arrive.shared} of {arrive.prompt} prompt tokens with what program "
                f"{arrive.program!r} holds ({pin})"
            )
        seq = Seq(arrive, self._arrivals, len(self._pages.flat), self.limits.max_model_len)
        self._arrivals += 1
        if seq.program:
            self._programs.arrive(seq)
        self._roster.arrive(seq, arrive.parent)

    def _step_done(self, done: StepDone) -> None:
        if not self._in_flight or self._in_flight[0].step != done.step:
            expected = self._in_flight[0].step if self._in_flight else "none"
            raise ValueError(f"StepDone of step {done.step}, but the oldest step in flight is {expected}")
        launched = self._in_flight.popleft()
        seqs, firsts, q = self._roster.seqs, launched.firsts, self.limits.q
        if len(done.results) != launched.rows:
            self._require_results(launched, done)
        for result in done.results:
            seq = seqs.get(result.seq)
            if seq is None:
                continue
            width = 1 if result.seq in firsts else q
            if not 0 <= result.tokens <= width or not seq.pending_rows:
                raise ValueError(
                    f"step {done.step} gave sequence {seq.id} {result.tokens} tokens; it has {seq.pending_rows} rows "
                    f"in flight, of {width} tokens"
                )
            seq.pending_rows -= 1
            seq.pending_tokens -= width
            seq.known = known = seq.known + result.tokens
            if seq.phase is DECODE and known > seq.computed:
                seq.computed = known - 1  # the newest token's KV is computed by the next row
            if result.hashes:
                seq.hashes.extend(result.hashes)
            if len(seq.hashes) > seq.published and seq.resident:
                self._pages.publish(seq)
            if result.finished:
                self._remove(seq)
            elif seq.slot == NO_SLOT:
                self._roster.requeue(seq)

    def _require_results(self, launched: Launched, done: StepDone) -> None:
        """Rows may lack a result only if their sequence was aborted; a live one would wait for it for ever."""
        told = {result.seq for result in done.results}
        rows = {work.seq for work in launched.plan.decode + launched.plan.prefill if work.samples}
        missing = sorted(seq for seq in rows - told if seq in self._roster.seqs)
        if missing:
            raise ValueError(f"StepDone of step {done.step} has no result for sequences {missing}")

    def _moved(self, move: int) -> None:
        seq = self._swap.done(move)
        if seq is not None and seq.id in self._roster.seqs:
            self._roster.requeue(seq)

    def _land(self, came: PagesCame) -> None:
        pools = {(rule.group, rule.cls) for rule in self._pages.rules}
        for group, cls, index in came.pages:
            if (group, cls) not in pools or not 0 <= index < len(came.hashes):
                raise ValueError(
                    f"page {index} of group {group}, class {cls} came for a prefix of {len(came.hashes)} pages; groups "
                    f"and classes are {sorted(pools)}"
                )
        if len(set(came.pages)) != len(came.pages):
            raise ValueError("a page came twice for one place")
        landed = self._pages.land(came.hashes, came.pages) if self.limits.enable_prefix_caching else None
        pages = tuple((item, *came.pages[item][:2], page) for item, page in landed or ())
        self._landings.append(Landing(came.id, landed is not None, pages))

    def _remove(self, seq: Seq) -> None:
        if seq.resident and seq.program and not seq.last_turn:
            self._programs.ended(seq, self.view.now, self._guard.pin_s(seq, self.view))
        else:
            self._programs.gone(seq)
            if seq.kept is None and seq.preemptions and self._swap.hosts:
                seq.kept = keep(self._pages, seq)  # pages that it took back have kept the names it gave them
            if seq.kept is not None:
                forget(self._pages, seq.kept)
                self._swap.forget(seq.kept)
                seq.kept = None
            self._pages.drop(seq)
        if seq.preemptions:
            self._swap.ended(seq)
        self._roster.remove(seq)

    # Out

    def plan(self) -> Plan:
        """The next step.

        Raises:
            RuntimeError: more steps are in flight than `limits.lag` allows.
        """
        if len(self._in_flight) > self.limits.lag:
            steps = [launched.step for launched in self._in_flight]
            raise RuntimeError(f"plan() with steps {steps} unanswered; lag {self.limits.lag} allows {self.limits.lag}")
        plan = build_plan(
            self._guard, self.view, self._roster, self._pages, self._programs, self._swap, len(self._in_flight)
        )
        if self._landings:
            plan = msgspec.structs.replace(plan, landings=tuple(self._landings))
            self._landings.clear()
        self.view.step += 1
        self._guard.on_plan(plan, self.view)
        self._preemptions += len(plan.preempted)
        if plan.has_work:
            firsts = frozenset(work.seq for work in plan.prefill if work.samples)
            self._in_flight.append(Launched(plan.step, len(plan.decode) + len(firsts), firsts, plan))
            self._rows += len(plan.decode)
            self._tiles += len(plan.prefill)
            self._prefilled += sum(work.count for work in plan.prefill)
        if self._recorder is not None:
            self._recorder.plan(plan)
        return plan

    def pinned(self, program: str) -> SeqId | None:
        """The sequence whose pages the program holds. The next turn's `Arrive.shared` compares its prompt with it."""
        pin = self._programs.get(program)
        return None if pin is None else pin.seq.id

    def cached(self, hashes: Sequence[bytes]) -> tuple[int, tuple[tuple[int, int, int, int], ...]]:
        """The longest cached prefix of the pages named `hashes`: its length in pages, and group, class, index and page
        of everything that a sequence needs to go on behind it. The pages stay what they are until the next plan."""
        start = self._pages.cached(hashes, len(hashes))
        pages = (
            (rule.group, rule.cls, index, page)
            for rule, shared in zip(self._pages.rules, start.shared, strict=True)
            for index, page in shared.items()
        )
        return start.tokens // self.limits.page_tokens, tuple(pages)

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs, or a step is in flight."""
        return bool(self._roster.seqs) or bool(self._in_flight)

    @property
    def moves_under_way(self) -> int:
        """Moves that MoveDone has yet to name."""
        return self._swap.under_way

    @property
    def next_wake(self) -> float | None:
        """When to plan again although no event has come and the last plan had no work; None: only events matter."""
        return self._guard.next_wake(self.view)

    @property
    def policy_error(self) -> Exception | None:
        """What the policy raised last; arrival order took its place for that step (`counters["policy_errors"]`)."""
        return self._guard.last_error

    @property
    def counters(self) -> dict[str, float]:
        """Totals since start. Named after vLLM's metrics where it has one; all but preemptions and rows in tokens."""
        return {
            "num_preemptions": self._preemptions,
            "policy_errors": self._guard.errors,
            "prefix_cache_queries": self._pages.queries,
            "prefix_cache_hits": self._pages.hits,
            "program_tokens_reused": self._programs.reused,
            "swap_out_bytes": self._swap.out_bytes,
            "swap_in_bytes": self._swap.in_bytes,
            "swap_out_moves": self._swap.out_moves,
            "swap_in_moves": self._swap.in_moves,
            "swap_pages_still_valid": self._swap.resent,
            "prefill_tokens": self._prefilled,
            "prefill_padding_tokens": self._tiles * self.limits.page_tokens - self._prefilled,
            "decode_rows": self._rows,
        }

    @property
    def gauges(self) -> dict[str, float]:
        return {
            "num_requests_running": len(self._roster.residents),
            "num_requests_waiting": self._roster.num_waiting,
            "num_programs_pinned": self._programs.num_hard,
            "kv_cache_usage_perc": self._pages.usage(),
            "swap_usage_perc": self._swap.usage(),
        }

    def check_integrity(self) -> None:
        """Every page and slot is accounted for.

        Raises:
            IntegrityError: what does not add up.
        """
        self._roster.check()
        self._pages.check([*self._roster.seqs.values(), *self._programs.owners()], self._swap.held())
        self._swap.check()
