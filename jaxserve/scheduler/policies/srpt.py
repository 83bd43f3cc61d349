"""Shortest remaining time first: a bound, not a policy to run."""

from __future__ import annotations

from collections.abc import Iterator

from jaxserve.scheduler.costs import cost
from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Evict, decodes, prefills
from jaxserve.scheduler.queue import QueueingPolicy
from jaxserve.scheduler.view import SeqView, View


@register("srpt")
class SRPT(QueueingPolicy):
    """Who needs least time to finish computes first; a newcomer displaces whoever needs longer by `margin` (a ratio).

    It knows output lengths (`Arrive.output`), which simulations and benchmarks supply and nobody else has; without them
    it believes `max_tokens`. On one server SRPT minimizes the mean time to completion (Schrage 1968), so it bounds what
    a policy that has to guess can reach.
    """

    displaces = True

    def __init__(self, margin: float = 1.5) -> None:
        super().__init__()
        self.margin = margin

    def key(self, seq: SeqView, view: View) -> float:
        return _need(seq, *_rates(view))

    def rank(self, view: View) -> Iterator[SeqView]:
        rates = _rates(view)
        yield from self._displacing(view, rates)
        yield from decodes(view)
        yield from sorted(prefills(view), key=lambda seq: (_need(seq, *rates), seq.order))
        if view.has_slot:
            yield from self.waiting(view)

    def _displacing(self, view: View, rates: tuple[float, float]) -> Iterator[SeqView]:
        """Those that may push somebody out; they come before those that could be pushed out have computed."""
        longest = max((_need(seq, *rates) for seq in view.residents()), default=0.0)
        for seq in self.waiting(view):
            if _need(seq, *rates) * self.margin >= longest:
                return
            yield seq

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        margin = 1.0 if want.resident else self.margin
        return Evict.SWAP if self.key(want, view) * margin < self.key(victim, view) else None

    def victims(self, view: View) -> Iterator[SeqView]:
        rates = _rates(view)
        ranked = sorted([(_need(seq, *rates), seq.order, seq) for seq in view.residents()], reverse=True)
        return (seq for _, _, seq in ranked)


def _rates(view: View) -> tuple[float, float]:
    """Seconds for a token to generate and for one to prefill."""
    return cost(view, "step_s") + cost(view, "decode_row_s"), cost(view, "prefill_token_s")


def _need(seq: SeqView, decode_s: float, prefill_s: float) -> float:
    output = seq.max_new if seq.output is None else seq.output
    return max(1, output - seq.known + seq.prompt) * decode_s + (seq.target - seq.computed) * prefill_s
