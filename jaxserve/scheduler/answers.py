"""How long answers turn out to be, for policies that learn from it. Knows no policy."""

from __future__ import annotations

from jaxserve.scheduler.view import SeqView, View
from jaxserve.types import Abort, Arrive, Event, SeqId, StepDone


class Answers:
    """Follows the event stream; an aborted sequence has no answer."""

    def __init__(self) -> None:
        self._unfinished: dict[SeqId, SeqView] = {}

    def ended(self, event: Event, view: View) -> list[int]:
        """Tokens of each answer that ended with `event`. Wants every event."""
        if isinstance(event, StepDone):
            ended = (self._unfinished.pop(result.seq, None) for result in event.results if result.finished)
            return [seq.generated for seq in ended if seq is not None]
        if isinstance(event, Arrive):
            arrived = view.get(event.seq)
            if arrived is not None:
                self._unfinished[event.seq] = arrived
        elif isinstance(event, Abort):
            self._unfinished.pop(event.seq, None)
        return []
