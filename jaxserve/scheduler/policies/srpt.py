"""Shortest remaining time first: a bound, not a policy to run."""

from __future__ import annotations

from jaxserve.scheduler.costs import cost
from jaxserve.scheduler.policies import register
from jaxserve.scheduler.queue import DisplacingPolicy
from jaxserve.scheduler.view import SeqView, View


@register("srpt")
class SRPT(DisplacingPolicy):
    """Who needs least time to finish computes first; a newcomer displaces whoever needs longer by `margin` (a ratio).

    It knows output lengths (`Arrive.output`), which simulations and benchmarks supply and nobody else has; without them
    it believes `max_tokens`. On one server SRPT minimizes the mean time to completion (Schrage 1968), so it bounds what
    a policy that has to guess can reach.
    """

    def __init__(self, margin: float = 1.5) -> None:
        super().__init__()
        self.margin = margin

    def key(self, seq: SeqView, view: View) -> float:
        """Seconds that it still needs: for its prompt, and for an answer of at least a token."""
        output = seq.max_new if seq.output is None else seq.output
        decode_s = cost(view, "step_s") + cost(view, "decode_row_s")
        return max(1, output - seq.generated) * decode_s + seq.remaining * cost(view, "prefill_token_s")

    def most(self, seq: SeqView, view: View) -> float:
        return self.key(seq, view)

    def pays(self, want: float, victim: float, view: View) -> bool:
        return want * self.margin < victim
