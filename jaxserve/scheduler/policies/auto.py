"""Chooses between policies by what requests turn out to be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from math import sqrt

from jaxserve.scheduler.answers import Answers
from jaxserve.scheduler.policies import make, register
from jaxserve.scheduler.policy import Evict, Policy
from jaxserve.scheduler.view import Budget, PinView, SeqView, View
from jaxserve.types import Event, Plan, SeqId


@register("auto")
class Auto(Policy):
    """`sarathi` where answers are of like length, `mlfq` where a few are far longer than the rest.

    Short jobs first pays when service times are spread out: least-attained-service beats first come, first served where
    their coefficient of variation is above 1, and loses where it is below (docs/techniques/which-policy.md). It is
    measured over answers that have ended, with exponential forgetting; `low` and `high` keep the choice from flapping.
    Both policies see every event, so either can go on from any state.
    """

    def __init__(self, low: float = 1.0, high: float = 1.3, least: int = 50, forget: float = 0.005) -> None:
        self.low = low
        self.high = high
        self.least = least
        self.forget = forget
        self._policies: dict[str, Policy] = {name: make(name) for name in ("sarathi", "mlfq")}
        self.choice = "sarathi"
        self._seen = 0
        self._mean = 0.0
        self._square = 0.0
        self._answers = Answers()

    @property
    def spread(self) -> float:
        """Coefficient of variation of the lengths of answers."""
        return sqrt(max(0.0, self._square - self._mean**2)) / self._mean if self._mean else 0.0

    @property
    def _now(self) -> Policy:
        return self._policies[self.choice]

    @property
    def displaces(self) -> bool:  # type: ignore[override]
        return self._now.displaces

    def on_event(self, event: Event, view: View) -> None:
        for policy in self._policies.values():
            policy.on_event(event, view)
        for length in self._answers.ended(event, view):
            self._learn(length)

    def _learn(self, length: int) -> None:
        self._seen += 1
        weight = max(self.forget, 1 / self._seen)
        self._mean += weight * (length - self._mean)
        self._square += weight * (length**2 - self._square)
        if self._seen >= self.least:
            if self.spread > self.high:
                self.choice = "mlfq"
            elif self.spread < self.low:
                self.choice = "sarathi"

    def on_plan(self, plan: Plan, view: View) -> None:
        for policy in self._policies.values():
            policy.on_plan(plan, view)

    def rank(self, view: View) -> Iterator[SeqView]:
        return self._now.rank(view)

    def tokens(self, seq: SeqView, left: Budget, view: View) -> int:
        return self._now.tokens(seq, left, view)

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        return self._now.may_preempt(want, victim, view)

    def victims(self, view: View) -> Iterator[SeqView]:
        return self._now.victims(view)

    def pins(self, view: View) -> Iterator[PinView]:
        return self._now.pins(view)

    def residency(self, view: View, planned: Set[SeqId]) -> Iterable[SeqView]:
        return self._now.residency(view, planned)
