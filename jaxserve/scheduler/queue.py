"""Waiting sequences in an order of their own, for policies. Knows no pages and no plans beyond who was admitted."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heappop, heappush
from math import inf
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

    def __reversed__(self) -> Iterator[tuple[Any, SeqView]]:
        """With their keys."""
        return ((entry[0], entry[2]) for entry in reversed(self._entries))

    def add(self, seq: SeqView, key: Any) -> None:
        self._keys[seq.id] = (key, seq.order)
        entry = (key, seq.order, seq)
        if self._entries and entry < self._entries[-1]:
            insort(self._entries, entry)
        else:  # the usual case: keys are times or counters
            self._entries.append(entry)

    def discard(self, seq: SeqId) -> None:
        key = self._keys.pop(seq, None)
        if key is not None:
            del self._entries[bisect_left(self._entries, key)]


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
                    self.gone(result.seq)
        elif isinstance(event, Abort):
            self.gone(event.seq)

    def gone(self, seq: SeqId) -> None:
        """It has ended."""
        self._waiting.discard(seq)

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
    """Who waits may take the place of a resident: smallest `key` first, and residents with the largest one yield.

    A subclass says what the key is, which difference is worth it (`pays`), and up to which value the key of a resident
    can rise (`most`): of hundreds of residents only those that may have the largest are asked for theirs.
    """

    displaces = True

    def __init__(self) -> None:
        super().__init__()
        self._running = Queue()
        """Residents by `most`."""

    def key(self, seq: SeqView, view: View) -> float:
        raise NotImplementedError

    def most(self, seq: SeqView, view: View) -> float:
        """A number that the key of a resident, just admitted, never exceeds."""
        raise NotImplementedError

    def pays(self, want: float, victim: float, view: View) -> bool:
        """Whether a waiting sequence with the key `want` takes the place of a resident with the key `victim`. If it
        does, it takes that of any with a larger key."""
        raise NotImplementedError

    def gone(self, seq: SeqId) -> None:
        super().gone(seq)
        self._running.discard(seq)

    def on_plan(self, plan: Plan, view: View) -> None:
        super().on_plan(plan, view)
        for preempted in plan.preempted:
            self._running.discard(preempted)
        for admit in plan.admits:
            seq = view.get(admit.seq)
            if seq is not None:
                self._running.add(seq, self.most(seq, view))

    def rank(self, view: View) -> Iterator[SeqView]:
        yield from self._displacing(view)
        yield from decodes(view)
        yield from sorted(prefills(view), key=lambda seq: (self.key(seq, view), seq.order))
        for seq in self.waiting(view):
            if not view.has_slot:
                return
            yield seq

    def _displacing(self, view: View) -> Iterator[SeqView]:
        """Those that may push somebody out; they come before those that could be pushed out have computed."""
        worst: float | None = None
        bound = next((most for most, _ in reversed(self._running)), -inf)
        for seq in self.waiting(view):
            mine = self.key(seq, view)
            if not self.pays(mine, bound, view):
                return
            if worst is None:
                worst = next(key for key, _ in self._largest(view))
            if not self.pays(mine, worst, view):
                return
            yield seq

    def _largest(self, view: View) -> Iterator[tuple[float, SeqView]]:
        """Residents by falling key."""
        known: list[tuple[float, int, SeqView]] = []
        rest = reversed(self._running)
        bound, seq = next(rest, (-inf, None))
        while known or seq is not None:
            while seq is not None and (not known or bound >= -known[0][0]):
                heappush(known, (-self.key(seq, view), -seq.order, seq))
                bound, seq = next(rest, (-inf, None))
            key, _, largest = heappop(known)
            yield -key, largest

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        mine, other = self.key(want, view), self.key(victim, view)
        yields = mine < other if want.resident else self.pays(mine, other, view)
        return Evict.SWAP if yields else None

    def victims(self, view: View) -> Iterator[SeqView]:
        return (seq for _, seq in self._largest(view))
