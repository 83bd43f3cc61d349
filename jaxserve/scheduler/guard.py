"""A policy that fails hurts nobody: arrival order takes its place for the step. Knows no engine and no log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any, TypeVar

from jaxserve.scheduler.policy import Evict, Policy, decodes, prefills
from jaxserve.scheduler.view import Budget, PinView, SeqView, View
from jaxserve.types import Event, Plan, SeqId

T = TypeVar("T")


class ArrivalOrder(Policy):
    """What a policy answers that has nothing to say."""

    def rank(self, view: View) -> Iterator[SeqView]:
        yield from decodes(view)
        yield from prefills(view)
        yield from view.waiting()


class Guard(Policy):
    """Asks `policy`, and `ArrivalOrder` whenever that raises; then also for the rest of the plan that is being made.

    `errors` counts the exceptions, `last_error` is the newest of them: the engine says so in its log.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.name = policy.name
        self.errors = 0
        self.last_error: Exception | None = None
        self._fallback = ArrivalOrder()
        self._failed = False
        self.wants_pages = type(policy).residency is not Policy.residency
        """Whether `residency` has anything to say: the set of planned sequences is not free."""
        self.all_decode = getattr(policy.tokens, "__func__", None) is Policy.tokens
        """Whether each sequence that is ranked and generates gets its row. Asking hundreds in each step takes time."""
        if self.all_decode:  # cannot fail
            self.tokens = policy.tokens  # type: ignore[method-assign]

    @property
    def params(self) -> dict[str, Any]:
        return self.policy.params

    @property
    def displaces(self) -> bool:  # type: ignore[override]
        return self.policy.displaces and not self._failed

    @property
    def skips_misfits(self) -> bool:  # type: ignore[override]
        return self.policy.skips_misfits and not self._failed

    def on_event(self, event: Event, view: View) -> None:
        try:
            self.policy.on_event(event, view)
        except Exception as error:
            self._note(error)

    def on_plan(self, plan: Plan, view: View) -> None:
        try:
            self.policy.on_plan(plan, view)
        except Exception as error:
            self._note(error)
        self._failed = False

    def rank(self, view: View) -> Iterator[SeqView]:
        if not self._failed:
            try:
                for seq in self.policy.rank(view):
                    yield seq
                    if self._failed:  # some other answer
                        break
                else:
                    return
            except Exception as error:
                self._note(error)
        yield from self._fallback.rank(view)  # the builder passes over those that have had their share

    def tokens(self, seq: SeqView, left: Budget, view: View) -> int:
        if not self._failed:
            try:
                return self.policy.tokens(seq, left, view)
            except Exception as error:
                self._note(error)
        return self._fallback.tokens(seq, left, view)

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        return self._answer(lambda policy: policy.may_preempt(want, victim, view))

    def victims(self, view: View) -> Iterator[SeqView]:
        """Lazy: most often the first of hundreds is enough. Nobody is offered twice, whoever answers."""
        offered: set[SeqId] = set()
        if not self._failed:
            try:
                for seq in self.policy.victims(view):
                    offered.add(seq.id)
                    yield seq
                return
            except Exception as error:
                self._note(error)
        for seq in self._fallback.victims(view):
            if seq.id not in offered:
                yield seq

    def pin_s(self, seq: SeqView, view: View) -> float:
        return self._answer(lambda policy: policy.pin_s(seq, view))

    def pins(self, view: View) -> Iterator[PinView]:
        return iter(self._answer(lambda policy: list(policy.pins(view))))  # a generator may raise at its end only

    def may_unpin(self, want: SeqView, pin: PinView, view: View) -> bool:
        return self._answer(lambda policy: policy.may_unpin(want, pin, view))

    def residency(self, view: View, planned: Set[SeqId]) -> Iterable[SeqView]:
        return self._answer(lambda policy: tuple(policy.residency(view, planned)))

    def next_wake(self, view: View) -> float | None:
        return self._answer(lambda policy: policy.next_wake(view))

    def _answer(self, ask: Callable[[Policy], T]) -> T:
        if not self._failed:
            try:
                return ask(self.policy)
            except Exception as error:
                self._note(error)
        return ask(self._fallback)

    def _note(self, error: Exception) -> None:
        self.errors += 1
        self.last_error = error
        self._failed = True
