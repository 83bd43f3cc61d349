"""A policy that fails hurts nobody."""

import pytest

from jaxserve.scheduler import Policy
from tests.scheduler.driver import Driver, groups_of, limits_of


class Failing(Policy):
    """Raises at the n-th question of a kind."""

    displaces = True

    def __init__(self, hook: str, every: int) -> None:
        self.hook = hook
        self.every = every
        self._asked = 0

    def _maybe_raise(self, hook: str) -> None:
        if hook == self.hook:
            self._asked += 1
            if self._asked % self.every == 0:
                raise RuntimeError(f"no {hook}")

    def on_event(self, event, view):
        self._maybe_raise("on_event")

    def on_plan(self, plan, view):
        self._maybe_raise("on_plan")

    def rank(self, view):
        self._maybe_raise("rank")
        for seq in [*view.newest_residents(), *view.waiting()]:
            self._maybe_raise("rank item")
            yield seq

    def tokens(self, seq, left, view):
        self._maybe_raise("tokens")
        return super().tokens(seq, left, view)

    def may_preempt(self, want, victim, view):
        self._maybe_raise("may_preempt")
        return super().may_preempt(want, victim, view)

    def victims(self, view):
        self._maybe_raise("victims")
        for seq in super().victims(view):
            yield seq
            self._maybe_raise("victims item")

    def pin_s(self, seq, view):
        self._maybe_raise("pin_s")
        return super().pin_s(seq, view)

    def next_wake(self, view):
        self._maybe_raise("next_wake")


HOOKS = [
    "on_event",
    "on_plan",
    "rank",
    "rank item",
    "tokens",
    "may_preempt",
    "victims",
    "victims item",
    "pin_s",
    "next_wake",
]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_policy_that_fails_hurts_nobody(hook, every):
    driver = Driver(Failing(hook, every), limits_of(enable_prefix_caching=False), groups_of((10, None)))
    for seq in range(6):
        driver.arrive(seq, 60, max_new=200, program=str(seq))
        driver.step()
        assert driver.scheduler.next_wake is None
    driver.run()
    assert all(host.generated == 200 for host in driver.hosts.values())
    assert driver.scheduler.counters["policy_errors"] > 0
    assert str(driver.scheduler.policy_error) == f"no {hook}"
