"""Agents: programs in order of their first turn, and what they hold while a tool runs."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator

from jaxserve.scheduler.costs import prefill_s
from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Evict, decodes, prefills
from jaxserve.scheduler.queue import Queue, QueueingPolicy
from jaxserve.scheduler.view import PinView, SeqView, View
from jaxserve.types import Abort, Arrive, CloseProgram, Event, Plan, SeqId, SeqResult, StepDone

KEPT = 1024
"""Programs below this number are never forgotten."""
GIVEN_UP_S = 3600.0
"""Idle for so long, a program may be."""


class Durations:
    """The last `size` durations of a tool, sorted."""

    __slots__ = ("_recent", "_size", "sorted")

    def __init__(self, size: int = 512) -> None:
        self._recent: deque[float] = deque()
        self._size = size
        self.sorted: list[float] = []

    def __len__(self) -> int:
        return len(self.sorted)

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        insort(self.sorted, seconds)
        if len(self._recent) > self._size:
            del self.sorted[bisect_right(self.sorted, self._recent.popleft()) - 1]


class Program:
    """`came`: when its first turn arrived; `idle_since`: when its last turn ended, None while one waits or runs."""

    __slots__ = ("came", "idle_since", "tool", "turns")

    def __init__(self, came: float) -> None:
        self.came = came
        self.turns = 0
        self.idle_since: float | None = None
        self.tool = ""


class Turn:
    """A turn that waits or runs. `pinned`: its program held its pages when it came."""

    __slots__ = ("pinned", "seq", "started")

    def __init__(self, seq: SeqView, pinned: bool) -> None:
        self.seq = seq
        self.pinned = pinned
        self.started = False


class Correlation:
    """Of all pairs so far."""

    __slots__ = ("_n", "_sx", "_sxx", "_sxy", "_sy", "_syy")

    def __init__(self) -> None:
        self._n = self._sx = self._sy = self._sxx = self._syy = self._sxy = 0.0

    def add(self, x: float, y: float) -> None:
        self._n += 1
        self._sx += x
        self._sy += y
        self._sxx += x * x
        self._syy += y * y
        self._sxy += x * y

    @property
    def value(self) -> float | None:
        """None until there are enough pairs that differ."""
        xx = self._n * self._sxx - self._sx**2
        yy = self._n * self._syy - self._sy**2
        if self._n < 20 or xx <= 0 or yy <= 0:
            return None
        return (self._n * self._sxy - self._sx * self._sy) / (xx * yy) ** 0.5


@register("continuum")
class Continuum(QueueingPolicy):
    """Tool-aware time to live for pins, and program-level first come, first served (Continuum, arXiv:2511.02230).

    When a turn ends, its KV is held for the time t that maximizes P(tool returns within t) * benefit - t, over what the
    tool took so far (all tools together where it has been seen less than `enough` times, `default_s` where they have
    been seen less than `few` times). The benefit is what a lost pin costs: computing the context again, and queueing
    again as far as programs tend to go on (`eta`: minus the correlation of turns done and turns left). Programs with a
    pin come first, then in order of their first turn. Who runs out of pages takes them from the newest program; pins
    yield only when nothing could run otherwise.
    """

    def __init__(self, default_s: float = 2.0, few: int = 10, enough: int = 100, smoothing: float = 0.05) -> None:
        super().__init__()
        self.default_s = default_s
        self.few = few
        self.enough = enough
        self.smoothing = smoothing
        self._pinned = Queue()
        """Turns that wait for a slot and whose program held its pages when they came."""
        self._programs: dict[str, Program] = {}
        self._prune_at = KEPT
        self._turns: dict[SeqId, Turn] = {}
        self._tools: dict[str, Durations] = {}
        self._all_tools = Durations()
        self._going_on = Correlation()
        self._queued_s = 0.0
        """Time in the queue of turns without a pin, a moving mean."""

    # Events

    def key(self, seq: SeqView, view: View) -> float:
        program = self._programs.get(seq.program)
        return seq.arrival if program is None else program.came

    def on_event(self, event: Event, view: View) -> None:
        if isinstance(event, Arrive):
            self._turn_came(event, view)
        super().on_event(event, view)
        if isinstance(event, StepDone):
            for result in event.results:
                self._turn_went_on(result, view)
        elif isinstance(event, Abort):
            self._turn_ended(event.seq, view)
        elif isinstance(event, CloseProgram):
            self._programs.pop(event.program, None)

    def on_plan(self, plan: Plan, view: View) -> None:
        super().on_plan(plan, view)
        for admit in plan.admits:
            self._pinned.discard(admit.seq)

    def _turn_came(self, arrive: Arrive, view: View) -> None:
        seq = view.get(arrive.seq)
        if not arrive.program or seq is None:
            return
        program = self._programs.get(arrive.program)
        if program is None:
            self._prune(view.now)
            program = self._programs[arrive.program] = Program(view.now)
        elif program.idle_since is not None:
            took = view.now - program.idle_since
            self._tools.setdefault(program.tool, Durations()).add(took)
            self._all_tools.add(took)
        program.idle_since = None
        program.turns += 1
        pin = view.pin(arrive.program)
        self._turns[seq.id] = Turn(seq, pinned=pin is not None and pin.hard)
        if self._turns[seq.id].pinned:
            self._pinned.add(seq, self.key(seq, view))

    def _turn_went_on(self, result: SeqResult, view: View) -> None:
        turn = self._turns.get(result.seq)
        if turn is None:
            return
        if not turn.started and result.tokens:
            turn.started = True
            if not turn.pinned:
                queued = max(0.0, view.now - turn.seq.arrival - prefill_s(view, turn.seq.prompt))
                self._queued_s += self.smoothing * (queued - self._queued_s)
        if result.finished:
            self._turn_ended(result.seq, view)

    def _turn_ended(self, seq: SeqId, view: View) -> None:
        self._pinned.discard(seq)
        turn = self._turns.pop(seq, None)
        program = self._programs.get(turn.seq.program) if turn is not None else None
        if turn is None or program is None:
            return
        program.idle_since = view.now
        program.tool = turn.seq.tool
        if turn.seq.last_turn:
            for done in range(1, program.turns + 1):
                self._going_on.add(done, program.turns - done)
            del self._programs[turn.seq.program]

    def _prune(self, now: float) -> None:
        """Forgets programs that never said their last turn."""
        if len(self._programs) >= self._prune_at:
            for name, program in list(self._programs.items()):
                if program.idle_since is not None and now - program.idle_since > GIVEN_UP_S:
                    del self._programs[name]
            self._prune_at = KEPT + 2 * len(self._programs)

    # Answers

    def rank(self, view: View) -> Iterator[SeqView]:
        yield from decodes(view)
        yield from prefills(view)
        for seq in self._pinned:
            if not view.admitting:
                return
            pin = view.pin(seq.program)
            if seq.ready and pin is not None and pin.hard:
                yield seq
        yield from self.waiting(view)

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        later = (self.key(victim, view), victim.order) > (self.key(want, view), want.order)
        return Evict.SWAP if want.resident and later else None

    def victims(self, view: View) -> Iterator[SeqView]:
        """The newest program first, those on their last turn at the end: they will give their pages back soon."""

        def worth(seq: SeqView) -> tuple[bool, float, int]:
            return (not seq.last_turn, self.key(seq, view), seq.order)

        return iter(sorted(view.residents(), key=worth, reverse=True))

    def pin_s(self, seq: SeqView, view: View) -> float:
        history = self._tools.get(seq.tool)
        if history is None or len(history) < self.enough:
            history = self._all_tools
        if len(history) < self.few:
            return self.default_s
        benefit = self._queued_s * self._eta + prefill_s(view, seq.computed)
        best, hold, count = 0.0, 0.0, len(history)
        for seen, took in enumerate(history.sorted, 1):
            gain = seen / count * benefit - took
            if gain > best:
                best, hold = gain, took
        return hold

    @property
    def _eta(self) -> float:
        value = self._going_on.value
        return 1.0 if value is None else min(1.0, max(0.0, -value))

    def pins(self, view: View) -> Iterator[PinView]:
        return iter(sorted(view.pins(), key=lambda pin: pin.expires, reverse=True))

    def may_unpin(self, want: SeqView, pin: PinView, view: View) -> bool:
        return False
