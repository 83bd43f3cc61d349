"""What work will take, by the parameters that CostUpdate events bring: a step is linear in what it computes.

Until an update comes the figures are those of a 13B model on one A100 (DistServe, OSDI 2024): policies compare times
with each other, so their ratios matter.
"""

from __future__ import annotations

from jaxserve.scheduler.view import View

DEFAULTS = {"step_s": 0.02, "prefill_token_s": 1.0e-4, "decode_row_s": 4e-5, "context_token_s": 6.3e-7}


def cost(view: View, name: str) -> float:
    return view.cost.get(name, DEFAULTS[name])


def prefill_s(view: View, tokens: int) -> float:
    """Computing a prompt of `tokens` alone, in as many steps as the token budget makes of it."""
    steps = -(-tokens // max(1, view.limits.max_num_batched_tokens))
    return steps * cost(view, "step_s") + tokens * cost(view, "prefill_token_s")


def decode_s(view: View, tokens: int, context: int) -> float:
    """Generating `tokens` after `context`, beside others: a sequence waits for whole steps."""
    step = cost(view, "step_s") + cost(view, "decode_row_s")
    return tokens * (step + (context + tokens / 2) * cost(view, "context_token_s"))
