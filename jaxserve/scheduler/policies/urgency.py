"""Deadlines: the most urgent first."""

from __future__ import annotations

from collections.abc import Iterator

from jaxserve.scheduler.costs import cost
from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Evict, decodes, prefills
from jaxserve.scheduler.queue import QueueingPolicy
from jaxserve.scheduler.view import SeqView, View
from jaxserve.types import Abort, Event, SeqId, StepDone


@register("urgency")
class Urgency(QueueingPolicy):
    """Largest urgency first, urgency = time still needed - time left until the deadline (the local rule of
    HexGen-Text2SQL, arXiv:2505.05286).

    The time needed is the prompt's and that of an answer as long as answers have been so far. A request without a
    deadline gets `default_s`. Who is so late that the deadline cannot be met any more still goes first, as in the
    paper. A newcomer displaces a resident only if it is more urgent by `hysteresis_s`, and only if waiting would make
    it late.
    """

    displaces = True

    def __init__(self, default_s: float = 60.0, hysteresis_s: float = 5.0, smoothing: float = 0.05) -> None:
        super().__init__()
        self.default_s = default_s
        self.hysteresis_s = hysteresis_s
        self.smoothing = smoothing
        self._answer = 128.0
        """Tokens of an answer, a moving mean."""
        self._generated: dict[SeqId, int] = {}

    def key(self, seq: SeqView, view: View) -> float:
        return self._start(seq, *_rates(view))

    def _start(self, seq: SeqView, step_s: float, prefill_s: float, context_s: float) -> float:
        """When it must start at the latest: urgency without the time that passes for all alike."""
        deadline = seq.arrival + self.default_s if seq.deadline is None else seq.deadline
        known = seq.known
        answer = max(1.0, min(self._answer, seq.max_new) - known + seq.prompt)
        return deadline - (seq.target - seq.computed) * prefill_s - answer * (step_s + known * context_s)

    def on_event(self, event: Event, view: View) -> None:
        super().on_event(event, view)
        if isinstance(event, StepDone):
            for result in event.results:
                count = self._generated.pop(result.seq, 0) + result.tokens
                if result.finished:
                    self._answer += self.smoothing * (count - self._answer)
                else:
                    self._generated[result.seq] = count
        elif isinstance(event, Abort):
            self._generated.pop(event.seq, None)

    def rank(self, view: View) -> Iterator[SeqView]:
        rates = _rates(view)
        yield from self._displacing(view, rates)
        yield from decodes(view)
        yield from sorted(prefills(view), key=lambda seq: (self._start(seq, *rates), seq.order))
        if view.has_slot:
            yield from self.waiting(view)

    def _displacing(self, view: View, rates: tuple[float, float, float]) -> Iterator[SeqView]:
        """Those that may push somebody out; they come before those that could be pushed out have computed."""
        latest: float | None = None
        for seq in self.waiting(view):
            mine = self._start(seq, *rates)
            if mine >= view.now + self.hysteresis_s:
                return
            if latest is None:
                latest = max((self._start(other, *rates) for other in view.residents()), default=mine)
            if not self._displaces(mine, latest, view):
                return
            yield seq

    def _displaces(self, want: float, victim: float, view: View) -> bool:
        return want + self.hysteresis_s < victim and want < view.now + self.hysteresis_s

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        mine, other = self.key(want, view), self.key(victim, view)
        yields = mine < other if want.resident else self._displaces(mine, other, view)
        return Evict.SWAP if yields else None

    def victims(self, view: View) -> Iterator[SeqView]:
        rates = _rates(view)
        ranked = sorted([(self._start(seq, *rates), seq.order, seq) for seq in view.residents()], reverse=True)
        return (seq for _, _, seq in ranked)


def _rates(view: View) -> tuple[float, float, float]:
    """Seconds for a token to generate, for one to prefill, and for one to attend to."""
    step_s = cost(view, "step_s") + cost(view, "decode_row_s")
    return step_s, cost(view, "prefill_token_s"), cost(view, "context_token_s")
