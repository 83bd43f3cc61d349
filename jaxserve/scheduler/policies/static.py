"""Request-level batching: the baseline of systems without continuous batching."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Policy, decodes, prefills
from jaxserve.scheduler.request import DECODE
from jaxserve.scheduler.view import Budget, SeqView, View
from jaxserve.types import Abort, Event, SeqId, StepDone


@register("static")
class Static(Policy):
    """Batches of up to `max_num_seqs` sequences, in order of arrival; the next one starts when all have finished.

    Prompts of the batch are computed first. A member that does not fit into memory beside the others follows when it
    does, before the next batch.
    """

    def __init__(self) -> None:
        self._members: dict[SeqId, SeqView] = {}

    def on_event(self, event: Event, view: View) -> None:
        if isinstance(event, StepDone):
            for result in event.results:
                if result.finished:
                    self._members.pop(result.seq, None)
        elif isinstance(event, Abort):
            self._members.pop(event.seq, None)

    def rank(self, view: View) -> Iterator[SeqView]:
        if not self._members:
            self._members = {seq.id: seq for seq in islice(view.waiting(), view.limits.max_num_seqs)}
        yield from prefills(view)
        for seq in self._members.values():
            if seq.ready:
                yield seq
        yield from decodes(view)

    def tokens(self, seq: SeqView, left: Budget, view: View) -> int:
        if seq.phase is DECODE:
            return view.limits.q if left.tiles == view.limits.max_tiles else 0
        return super().tokens(seq, left, view)
