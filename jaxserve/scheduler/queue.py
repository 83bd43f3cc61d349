"""Waiting sequences in an order of their own, for policies. Knows no pages and no plans beyond who was admitted."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxserve.scheduler.policy import Evict, Policy, decodes, prefills
from jaxserve.scheduler.view import SeqView, View
from jaxserve.types import Abort, Arrive, Event, Plan, SeqId, StepDone


class Queue:
    """Sequences by rising key, equal keys by arrival. A key must not change while its sequence is in the queue.

    Adding and removing move a list of pointers: microseconds at ten thousand entries.
    """

    __slots__ = ("_entries", "_keys")

    def __init__(self) -> None:
        self._entries: list[tuple[Any, int, SeqView]] = []
        self._keys: dict[SeqId, tuple[Any, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, seq: SeqId) -> bool:
        return seq in self._keys

    def __iter__(self) -> Iterator[SeqView]:
        return (entry[2] for entry in self._entries)

    def add(self, seq: SeqView, key: Any) -> None:
        self._keys[seq.id] = (key, seq.order)
        insort(self._entries, (key, seq.order, seq))

    def discard(self, seq: SeqId) -> None:
        key = self._keys.pop(seq, None)
        if key is not None:
            del self._entries[bisect_left(self._entries, key)]

    def take(self, wanted: Callable[[SeqView], bool]) -> list[SeqView]:
        """Removes and returns those that are wanted, in order, in one pass however many they are."""
        taken = [entry[2] for entry in self._entries if wanted(entry[2])]
        if taken:
            for seq in taken:
                del self._keys[seq.id]
            self._entries = [entry for entry in self._entries if entry[2].id in self._keys]
        return taken


class QueueingPolicy(Policy):
    """Sarathi's steps (decodes, prompts partly computed, new ones) with another order of those that wait.

    A subclass says what that order is: `key`, asked when a sequence arrives and whenever it comes back.
    """

    def __init__(self) -> None:
        self._waiting = Queue()

    def key(self, seq: SeqView, view: View) -> Any:
        raise NotImplementedError

    def on_event(self, event: Event, view: View) -> None:
        if isinstance(event, Arrive):
            seq = view.get(event.seq)
            if seq is not None:
                self._waiting.add(seq, self.key(seq, view))
        elif isinstance(event, StepDone):
            for result in event.results:
                if result.finished:
                    self._waiting.discard(result.seq)
        elif isinstance(event, Abort):
            self._waiting.discard(event.seq)

    def on_plan(self, plan: Plan, view: View) -> None:
        for admit in plan.admits:
            self._waiting.discard(admit.seq)
        for preempted in plan.preempted:
            seq = view.get(preempted)
            if seq is not None:
                self._waiting.add(seq, self.key(seq, view))

    def waiting(self, view: View) -> Iterator[SeqView]:
        """Who could start, in this policy's order, as long as the plan admits any."""
        for seq in self._waiting:
            if not view.admitting:
                return
            if seq.ready:
                yield seq

    def rank(self, view: View) -> Iterator[SeqView]:
        yield from decodes(view)
        yield from prefills(view)
        yield from self.waiting(view)


class DisplacingPolicy(QueueingPolicy):
    """Who waits may take the place of a resident: smallest number first, and residents with the largest one yield.

    A subclass says what the numbers are (`values`) and which difference is worth it (`pays`).
    """

    displaces = True

    def __init__(self) -> None:
        super().__init__()
        self._residents: list[tuple[float, int, SeqView]] = []
        """Those of the plan that is being made, with their numbers: asked for more than once a step."""
        self._of_step = -1

    def values(self, seqs: Iterable[SeqView], view: View) -> list[float]:
        """The numbers of many sequences at once: there are hundreds of residents in every step."""
        raise NotImplementedError

    def pays(self, want: float, victim: float, view: View) -> bool:
        """Whether a waiting sequence with the number `want` takes the place of a resident with `victim`."""
        raise NotImplementedError

    def key(self, seq: SeqView, view: View) -> float:
        return self.values((seq,), view)[0]

    def rank(self, view: View) -> Iterator[SeqView]:
        yield from self._displacing(view)
        yield from decodes(view)
        started = prefills(view)
        if len(started) > 1:
            order = dict(zip((seq.id for seq in started), self.values(started, view), strict=True))
            started.sort(key=lambda seq: (order[seq.id], seq.order))
        yield from started
        for seq in self.waiting(view):
            if not view.has_slot:
                return
            yield seq

    def _displacing(self, view: View) -> Iterator[SeqView]:
        """Those that may push somebody out; they come before those that could be pushed out have computed."""
        largest: float | None = None
        for seq in self.waiting(view):
            if largest is None:
                largest = max(self._numbered(view), default=(0.0,))[0]
            if not self.pays(self.key(seq, view), largest, view):
                return
            yield seq

    def _numbered(self, view: View) -> list[tuple[float, int, SeqView]]:
        if self._of_step != view.step:
            residents = list(view.residents())
            orders = [seq.order for seq in residents]
            self._residents = list(zip(self.values(residents, view), orders, residents, strict=True))
            self._of_step = view.step
        return self._residents

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        mine, other = self.values((want, victim), view)
        yields = mine < other if want.resident else self.pays(mine, other, view)
        return Evict.SWAP if yields else None

    def victims(self, view: View) -> Iterator[SeqView]:
        return (seq for _, _, seq in sorted(self._numbered(view), reverse=True))
