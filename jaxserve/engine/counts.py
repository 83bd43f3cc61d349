"""What an engine counts besides the scheduler. Plain numbers under the names of server/metrics.py."""

from __future__ import annotations

from bisect import bisect_left

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, float("inf"))
"""Upper bounds of the buckets of `iteration_tokens_total`."""

NAMES = (
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "steps",
    "padded_tokens",
    "corrupted_requests",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
)


class Counts:
    """Totals since start: `totals[name]`, and a histogram of the tokens that steps computed."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = dict.fromkeys(NAMES, 0)
        self._steps = [0] * len(STEP_TOKENS)
        self._step_tokens = 0

    def step(self, tokens: int, places: int) -> None:
        """A step computed `tokens` in a batch with `places` for them."""
        self.totals["steps"] += 1
        self.totals["padded_tokens"] += places - tokens
        self._steps[bisect_left(STEP_TOKENS, tokens)] += 1
        self._step_tokens += tokens

    def read(self) -> dict[str, float]:
        """Everything by name; histogram buckets are cumulative, as Prometheus has them."""
        values, below = dict(self.totals), 0
        for bound, count in zip(STEP_TOKENS, self._steps, strict=True):
            below += count
            values[f'iteration_tokens_total_bucket{{le="{bound}"}}'] = below
        values["iteration_tokens_total_sum"] = self._step_tokens
        return values
