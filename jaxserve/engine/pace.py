"""How long steps take, learned while they run, for policies that plan by time. Knows no scheduler and no device."""

from __future__ import annotations

import numpy as np

from jaxserve.types import Plan

NAMES = ("step_s", "prefill_token_s", "decode_row_s", "context_token_s")
FORGET = 0.998
"""Weight of what was known when a step is added: a memory of some 500 steps."""
TELL_EVERY = 128
"""Steps between two updates; the first one comes after as many."""
OUTLIER = 8.0
"""A step that took so many times what was expected waited for something else (a page fault, another process)."""
SCALE = np.array([1.0, 1e3, 1e1, 1e5])
"""Typical amounts, so that the four unknowns have like weights in the ridge below."""
RIDGE = 1e-4


class Pace:
    """Least squares over recent steps: duration = step_s + tokens in tiles, rows, and tokens attended to, each at its
    rate. Rates that come out negative are taken as 0."""

    def __init__(self, page_tokens: int) -> None:
        """`page_tokens`: of a tile."""
        self._page_tokens = page_tokens
        self._squares = np.zeros((4, 4))
        self._products = np.zeros(4)
        self._rates = (0.0, 0.0, 0.0, 0.0)
        self._recent: list[tuple[float, float, float, float, float]] = []

    def add(self, plan: Plan, duration: float) -> dict[str, float] | None:
        """Takes a step into account. Now and then: the rates, by the names of CostUpdate."""
        tokens, rows = len(plan.prefill) * self._page_tokens, len(plan.decode)
        context = sum([work.start for work in plan.decode]) + rows
        empty, per_token, per_row, per_context = self._rates
        expected = empty + per_token * tokens + per_row * rows + per_context * context
        if expected and duration > OUTLIER * expected:
            return None
        self._recent.append((1.0, tokens, rows, context, duration))
        if len(self._recent) < TELL_EVERY:
            return None
        self._fold()
        self._rates = tuple((self._solved() / SCALE).tolist())
        return dict(zip(NAMES, self._rates, strict=True))

    def _fold(self) -> None:
        """Adds the recent steps to the sums: one by one it would cost each step more than planning it does."""
        recent = np.array(self._recent)
        amounts, durations = recent[:, :4] / SCALE, recent[:, 4]
        weights = FORGET ** np.arange(len(recent) - 1, -1, -1)
        kept = FORGET ** len(recent)
        self._squares = kept * self._squares + (amounts * weights[:, None]).T @ amounts
        self._products = kept * self._products + (amounts * weights[:, None]).T @ durations
        self._recent.clear()

    def _solved(self) -> np.ndarray:
        """Non-negative least squares by dropping what comes out negative: four unknowns need no better."""
        ridge = RIDGE * np.trace(self._squares) / 4 * np.eye(4)
        active = np.ones(4, bool)
        while True:
            rates = np.zeros(4)
            inside = np.ix_(active, active)
            rates[active] = np.linalg.solve((self._squares + ridge)[inside], self._products[active])
            if (rates >= 0).all():
                return rates
            active &= rates > 0
