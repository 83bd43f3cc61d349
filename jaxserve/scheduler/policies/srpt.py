"""Shortest remaining time first: a bound, not a policy to run."""

from __future__ import annotations

from collections.abc import Iterable

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

    def values(self, seqs: Iterable[SeqView], view: View) -> list[float]:
        """Seconds that each still needs: its prompt and its answer, which is at least a token."""
        decode_s = cost(view, "step_s") + cost(view, "decode_row_s")
        prefill_s = cost(view, "prefill_token_s")
        return [
            max(1, (seq.max_new if seq.output is None else seq.output) - seq.known + seq.prompt) * decode_s
            + (seq.target - seq.computed) * prefill_s
            for seq in seqs
        ]

    def pays(self, want: float, victim: float, view: View) -> bool:
        return want * self.margin < victim
