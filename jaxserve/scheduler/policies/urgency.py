"""Deadlines: the most urgent first."""

from __future__ import annotations

from jaxserve.scheduler.answers import Answers
from jaxserve.scheduler.costs import cost
from jaxserve.scheduler.policies import register
from jaxserve.scheduler.queue import DisplacingPolicy
from jaxserve.scheduler.view import SeqView, View
from jaxserve.types import Event


@register("urgency")
class Urgency(DisplacingPolicy):
    """Largest urgency first, urgency = time still needed - time left until the deadline (the local rule of
    HexGen-Text2SQL, arXiv:2505.05286).

    The time needed is the prompt's and that of an answer as long as answers have been so far. A request without a
    deadline gets `default_s`. Who is so late that the deadline cannot be met any more still goes first, as in the
    paper. A newcomer displaces a resident only if it is more urgent by `hysteresis_s`, and only if waiting would make
    it late.
    """

    def __init__(self, default_s: float = 60.0, hysteresis_s: float = 5.0, smoothing: float = 0.05) -> None:
        super().__init__()
        self.default_s = default_s
        self.hysteresis_s = hysteresis_s
        self.smoothing = smoothing
        self._answer = 128.0
        """Tokens of an answer, a moving mean."""
        self._answers = Answers()

    def key(self, seq: SeqView, view: View) -> float:
        """When it must start at the latest: urgency without the time that passes for all alike."""
        answer = max(1.0, min(self._answer, seq.max_new) - seq.generated)
        token_s = cost(view, "step_s") + cost(view, "decode_row_s") + seq.known * cost(view, "context_token_s")
        return self.most(seq, view) - seq.remaining * cost(view, "prefill_token_s") - answer * token_s

    def most(self, seq: SeqView, view: View) -> float:
        return seq.arrival + self.default_s if seq.deadline is None else seq.deadline

    def pays(self, want: float, victim: float, view: View) -> bool:
        return want + self.hysteresis_s < victim and want < view.now + self.hysteresis_s

    def on_event(self, event: Event, view: View) -> None:
        super().on_event(event, view)
        for length in self._answers.ended(event, view):
            self._answer += self.smoothing * (length - self._answer)
