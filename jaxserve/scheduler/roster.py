"""All unfinished sequences, by state, and the slots. Knows nothing of pages, policies and plans."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from operator import attrgetter

from jaxserve.scheduler.pool import IntegrityError
from jaxserve.scheduler.request import NO_SLOT, Phase, Seq
from jaxserve.types import SeqId

_order = attrgetter("order")


class ByArrival:
    """A few hundred sequences in order of arrival."""

    __slots__ = ("_seqs",)

    def __init__(self) -> None:
        self._seqs: list[Seq] = []

    def __len__(self) -> int:
        return len(self._seqs)

    def __iter__(self) -> Iterator[Seq]:
        return iter(self._seqs)

    def __reversed__(self) -> Iterator[Seq]:
        return reversed(self._seqs)

    def add(self, seq: Seq) -> None:
        insort(self._seqs, seq, key=_order)

    def discard(self, seq: Seq) -> None:
        at = bisect_left(self._seqs, seq.order, key=_order)
        if at < len(self._seqs) and self._seqs[at] is seq:
            del self._seqs[at]


class Roster:
    """Who is there. A plan changes phases and slots while it walks the queues; `commit` moves sequences between the
    queues when it is complete."""

    def __init__(self, slots: int) -> None:
        self.seqs: dict[SeqId, Seq] = {}
        self.residents = ByArrival()
        self._slots = slots
        self._free_slots = list(range(slots))
        heapify(self._free_slots)
        # New sequences queue up in order of arrival; those preempted or parked come back into the middle of that order.
        self._new: OrderedDict[SeqId, Seq] = OrderedDict()
        self._returned = ByArrival()

    def __len__(self) -> int:
        return len(self.seqs)

    @property
    def num_waiting(self) -> int:
        return len(self.seqs) - len(self.residents)

    @property
    def has_slot(self) -> bool:
        return bool(self._free_slots)

    def waiting(self) -> Iterator[Seq]:
        """Sequences that could start, in order of arrival. Lazy; the queue must not change meanwhile."""
        new, returned = iter(self._new.values()), iter(self._returned)
        a, b = next(new, None), next(returned, None)
        while a is not None or b is not None:
            if b is None or (a is not None and a.order < b.order):
                assert a is not None
                yield a
                a = next(new, None)
            else:
                yield b
                b = next(returned, None)

    def arrive(self, seq: Seq, parent: SeqId | None) -> None:
        """Enters the queue, or waits for the prompt of `parent` where that sequence is known and not that far yet."""
        self.seqs[seq.id] = seq
        family = self.seqs.get(parent) if parent is not None else None
        if family is not None:
            seq.family = family.family
            seq.family.append(seq)
            seq.parked = not seq.whole_prompt and family.phase is not Phase.DECODE and not family.generated
        if not seq.parked:
            self._new[seq.id] = seq

    def take_slot(self, seq: Seq) -> None:
        seq.slot = heappop(self._free_slots)

    def free_slot(self, seq: Seq) -> None:
        heappush(self._free_slots, seq.slot)
        seq.slot = NO_SLOT

    def commit(self, admitted: list[Seq], preempted: list[Seq], forkable: list[Seq]) -> None:
        """Queues follow the phases that a plan has set. `forkable`: their prompt will be computed by its step."""
        for seq in admitted:
            if self._new.pop(seq.id, None) is None:
                self._returned.discard(seq)
            self.residents.add(seq)
        for seq in preempted:
            self.residents.discard(seq)
            self.requeue(seq)
        for seq in forkable:
            for other in seq.family:
                self._unpark(other)

    def requeue(self, seq: Seq) -> None:
        """A sequence that is ready (again) may be admitted from now on."""
        if seq.ready:
            self._returned.add(seq)

    def withdraw(self, seq: Seq) -> None:
        """Takes a sequence that is not ready any more out of the queue; `requeue` brings it back."""
        if self._new.pop(seq.id, None) is None:
            self._returned.discard(seq)

    def remove(self, seq: Seq) -> None:
        """Forgets a finished or aborted sequence. Its pages are the caller's business."""
        del self.seqs[seq.id]
        if seq.resident:
            self.free_slot(seq)
            self.residents.discard(seq)
        elif self._new.pop(seq.id, None) is None:
            self._returned.discard(seq)
        seq.phase = Phase.FINISHED
        seq.family.remove(seq)
        if seq.family and all(other.parked for other in seq.family):
            self._unpark(seq.family[0])  # it computes the prompt for the others

    def _unpark(self, seq: Seq) -> None:
        if seq.parked:
            seq.parked = False
            self.requeue(seq)

    def check(self) -> None:
        """
        Raises:
            IntegrityError: slots or queues that do not add up.
        """
        held = [seq.slot for seq in self.seqs.values() if seq.resident]
        if sorted([*held, *self._free_slots]) != list(range(self._slots)):
            raise IntegrityError(f"slots held {held} and free {self._free_slots} are not all {self._slots}")
        if sorted(s.id for s in self.seqs.values() if s.resident) != sorted(s.id for s in self.residents):
            raise IntegrityError("the list of residents and the phases of sequences disagree")
        if sorted(s.id for s in self.seqs.values() if s.ready) != sorted(s.id for s in self.waiting()):
            raise IntegrityError("the queue and the sequences that are ready disagree")
