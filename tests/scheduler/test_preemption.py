"""Pages run out: who yields, when it comes back, and that nobody comes and goes."""

from collections import Counter
from collections.abc import Iterator

import pytest

from jaxserve.scheduler import Evict, Policy, SeqView, View
from jaxserve.types import SeqResult, StepDone
from tests.scheduler.driver import Driver, groups_of, limits_of


def crowded(policy: str | Policy = "sarathi", lag: int = 1, pages: int = 10) -> Driver:
    """Four sequences that start with a page each and want six each."""
    driver = Driver(policy, limits_of(lag=lag, enable_prefix_caching=False), groups_of((pages, None)))
    for seq in range(4):
        driver.arrive(seq, 60, max_new=300)
    return driver


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("policy", ["sarathi", "fcfs", "static", "priority"])
def test_later_arrivals_yield_and_the_first_never_does(policy, lag):
    driver = crowded(policy, lag)
    driver.run()
    assert driver.preempted[:1] == [3]
    assert 0 not in driver.preempted
    assert driver.scheduler.counters["num_preemptions"] == len(driver.preempted)


@pytest.mark.parametrize("pages", [6, 7, 10, 13])
def test_no_ping_pong(pages):
    """Room asked for doubles with each preemption, so six pages are there the second time or the third."""
    driver = crowded(pages=pages)
    driver.run()
    assert max(Counter(driver.preempted).values(), default=0) <= 2
    recomputed = driver.scheduler.counters["prefill_tokens"] - 4 * 60
    assert recomputed <= 0.75 * 4 * 300


def test_it_comes_back_with_what_it_had_generated():
    driver = crowded()
    driver.run()
    again = [seq for seq, times in Counter(driver.preempted).items() if times]
    for seq in again:
        tiles = [work for plan in driver.plans for work in plan.prefill if work.seq == seq]
        assert max(work.start + work.count for work in tiles) > 60
        assert driver.hosts[seq].generated == 300


def test_a_preempted_sequence_waits_for_its_step_in_flight():
    driver = crowded(lag=1)
    while not driver.preempted:
        before = driver.scheduler.view.step
        driver.step()
    seq = driver.preempted[0]
    last = driver.plans[before - 1]
    assert seq in [work.seq for work in last.decode], "its row was in flight when it lost its pages"
    known = driver.hosts[seq].generated
    driver.run()
    readmitted = next(p for p in driver.plans[before:] if any(a.seq == seq for a in p.admits))
    assert readmitted.step > before
    assert known > 0


def test_nobody_is_admitted_on_pages_just_taken_from_a_resident():
    driver = Driver(limits=limits_of(max_num_seqs=5, enable_prefix_caching=False), groups=groups_of((13, None)))
    for seq in range(4):
        driver.arrive(seq, 60 - 9 * seq, max_new=300)  # they need pages in different steps
    while driver.scheduler.view.free(0) > 1:
        driver.step()
    driver.arrive(9, 70, max_new=2)
    while not driver.preempted:
        driver.step()
    assert driver.scheduler.view.free(0) >= 2
    assert not driver.plans[-1].admits
    driver.run()


def test_a_finished_sequence_leaves_its_pages_to_the_plan_after_its_results():
    driver = Driver(limits=limits_of(lag=1, enable_prefix_caching=False), groups=groups_of((4, None)))
    driver.arrive(1, 60, max_new=100, stop=2)
    driver.arrive(2, 200, max_new=2)
    seen = [(sorted(w.seq for w in p.decode), [a.seq for a in p.admits]) for p in (driver.step() for _ in range(5))]
    # Step 1 brings the last token; step 2 still has a row of the sequence; its results admit the next one to step 3.
    assert seen[:4] == [([], [1]), ([1], []), ([1], []), ([], [2])]


class Stubborn(Policy):
    """Sarathi's order, and nobody ever yields."""

    def rank(self, view: View) -> Iterator[SeqView]:
        yield from view.residents()
        yield from view.waiting()

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> None:
        return None


class Displacing(Policy):
    """Newcomers, once let in, come first and may displace sequence 10."""

    displaces = True

    def __init__(self) -> None:
        self.open = False

    def rank(self, view: View) -> Iterator[SeqView]:
        if self.open or view.num_residents < 2:
            yield from view.waiting()
        yield from view.residents()

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        return Evict.RECOMPUTE if victim.id == 10 else None


def test_the_source_of_a_copy_is_not_the_target_of_another():
    """11 forks from 10; then 21 displaces 10 for the page that its own fork needs."""
    policy = Displacing()
    driver = Driver(policy, limits_of(lag=0, enable_prefix_caching=False), groups_of((7, None)))
    for seq in (10, 20):
        driver.arrive(seq, range(seq, seq + 100), max_new=60)
        driver.arrive(seq + 1, range(seq, seq + 100), max_new=5, parent=seq, choice=1)
    while driver.hosts[10].generated < 30 or driver.hosts[20].generated < 30:
        driver.step()
    policy.open = True
    plan = driver.step()
    assert [admit.seq for admit in plan.admits] == [11, 21]
    assert plan.preempted == (10,)
    assert len(plan.pages.copies) == 2  # the device checks that they do not depend on their order
    driver.run()


@pytest.mark.parametrize("lag", [0, 1])
def test_deadlocks_are_broken_whatever_the_policy_says(lag):
    driver = crowded(Stubborn(), lag)
    driver.run()
    assert driver.preempted
    assert all(host.generated == 300 for host in driver.hosts.values())


def test_a_sequence_that_finishes_with_its_last_step_after_being_preempted_is_gone():
    driver = crowded(lag=1)
    while not driver.preempted:
        driver.step()
    # The driver has reported by now; the same by hand, with a victim that its row in flight finishes.
    driver = Driver(limits=limits_of(lag=1, enable_prefix_caching=False), groups=groups_of((4, None)))
    driver.arrive(1, 64, max_new=130)
    driver.arrive(2, 64, max_new=130, stop=65)
    driver.run()
    assert driver.hosts[1].generated == 130 and driver.hosts[2].generated == 65


def test_late_results_of_an_aborted_sequence_are_ignored():
    driver = Driver(limits=limits_of(lag=1))
    driver.arrive(1, 10)
    driver.arrive(2, 10)
    driver.scheduler.plan()
    driver.scheduler.plan()
    driver.abort(1)
    driver.scheduler.on_event(
        StepDone(now=0.0, step=0, duration=0.1, results=(SeqResult(1, 1, True), SeqResult(2, 1, False)))
    )
    driver.scheduler.check_integrity()
    assert driver.scheduler.gauges["num_requests_running"] == 1
