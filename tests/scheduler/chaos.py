"""A policy without sense: whatever it answers, plans must be feasible and everybody must finish."""

from __future__ import annotations

import random
from collections.abc import Iterator

from jaxserve.scheduler import Evict, Policy, SeqView, View, policies
from jaxserve.scheduler.view import Budget


@policies.register("chaos")
class Chaos(Policy):
    """Random order, random amounts, random victims, from a seed."""

    displaces = True
    skips_misfits = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._random = random.Random(seed)

    def rank(self, view: View) -> Iterator[SeqView]:
        everybody = [*view.residents(), *view.waiting()]
        self._random.shuffle(everybody)
        return iter(everybody)

    def tokens(self, seq: SeqView, left: Budget, view: View) -> int:
        return self._random.choice([0, 1, 64, 100, 10_000])

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        return Evict.SWAP if self._random.random() < (0.3 if want.resident else 0.05) else None

    def victims(self, view: View) -> Iterator[SeqView]:
        everybody = list(view.residents())
        self._random.shuffle(everybody)
        return iter(everybody)
