"""Priority classes."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Evict, Policy, decodes, prefills
from jaxserve.scheduler.view import SeqView, View
from jaxserve.types import Abort, Arrive, Event, SeqId, StepDone

_key = attrgetter("priority", "order")
_priority = attrgetter("priority")


@register("priority")
class Priority(Policy):
    """Lower `priority` first (vLLM's convention), order of arrival within one; otherwise like Sarathi.

    Within a class decodes come before prompts partly computed and those before new ones. A waiting sequence displaces
    residents of a worse class, never of its own.
    """

    displaces = True

    def __init__(self) -> None:
        self._seqs: dict[SeqId, SeqView] = {}
        self._queue: list[SeqView] = []

    def on_event(self, event: Event, view: View) -> None:
        if isinstance(event, Arrive):
            seq = view.get(event.seq)
            if seq is not None:
                self._seqs[seq.id] = seq
                insort(self._queue, seq, key=_key)
        elif isinstance(event, StepDone):
            for result in event.results:
                if result.finished:
                    self._forget(result.seq)
        elif isinstance(event, Abort):
            self._forget(event.seq)

    def rank(self, view: View) -> Iterator[SeqView]:
        candidates = (seq for seq in self._queue if seq.ready)
        candidate = next(candidates, None) if view.admitting else None
        residents = [*decodes(view), *prefills(view)]
        residents.sort(key=_priority)  # stable: in a class, decodes first, each by arrival
        for resident in residents:
            while candidate is not None and view.admitting and candidate.priority < resident.priority:
                yield candidate
                candidate = next(candidates, None)
            yield resident
        while candidate is not None and view.admitting:
            yield candidate
            candidate = next(candidates, None)

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        if want.resident:
            return Evict.SWAP if _key(victim) > _key(want) else None
        return Evict.SWAP if victim.priority > want.priority else None

    def victims(self, view: View) -> Iterator[SeqView]:
        return iter(sorted(view.residents(), key=_key, reverse=True))

    def _forget(self, seq: SeqId) -> None:
        if seq in self._seqs:
            del self._queue[bisect_left(self._queue, _key(self._seqs.pop(seq)), key=_key)]
