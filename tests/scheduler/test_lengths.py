"""Upper and lower bounds while steps are in flight, windows, and the smallest pools in which a sequence can run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.driver import Driver, accept_randomly, groups_of, limits_of


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("max_new", [1, 2, 65])
def test_no_row_is_planned_beyond_the_end(lag, max_new):
    driver = Driver(limits=limits_of(lag=lag))
    driver.arrive(1, 70, max_new=max_new)
    driver.run()
    assert sum(len(plan.decode) for plan in driver.plans) == max_new - 1
    assert driver.hosts[1].generated == max_new


def test_a_sequence_that_stopped_early_may_have_one_row_in_flight():
    driver = Driver(limits=limits_of(lag=1))
    driver.arrive(1, 70, max_new=50, stop=3)
    driver.run()
    assert sum(len(plan.decode) for plan in driver.plans) == 3


def test_the_model_length_ends_a_sequence():
    driver = Driver(limits=limits_of(max_model_len=100, q=4), accepted=lambda: 3)
    driver.arrive(1, 90, max_new=500)
    driver.run()
    assert len(driver.hosts[1].tokens) == 100


def test_positions_are_upper_bounds_that_results_correct():
    driver = Driver(limits=limits_of(q=4, lag=1), accepted=lambda: 0)
    driver.arrive(1, 10, max_new=6)
    driver.run()
    starts = [plan.decode[0].start for plan in driver.plans if plan.decode]
    # After the prompt one token is in flight. From then on each row in flight may have brought four, but brings one.
    assert starts == [10, 14, 15, 16, 17]


@pytest.mark.parametrize("window", [1, 40, 64, 65, 130])
def test_pages_behind_the_window_are_freed_as_the_sequence_advances(window):
    driver = Driver(limits=limits_of(lag=0, max_tiles=1), groups=groups_of((64, window), (64, None)))
    driver.arrive(1, 150, max_new=200)
    while driver.hosts[1].generated < 199:
        driver.step()
        if driver.plans[-1].decode:
            position = driver.plans[-1].decode[0].start
            first = max(0, position - window + 1) // 64
            assert 64 - driver.scheduler.view.free(0) == position // 64 - first + 1
            assert 64 - driver.scheduler.view.free(1) == position // 64 + 1
    driver.run()


@settings(max_examples=60, deadline=None)
@given(
    window=st.sampled_from([None, 1, 63, 64, 65, 130]),
    prompt=st.integers(1, 300),
    max_new=st.integers(1, 120),
    q=st.sampled_from([1, 4]),
    lag=st.sampled_from([0, 1]),
    seed=st.integers(0, 1000),
)
def test_a_sequence_runs_alone_in_the_smallest_pool_that_is_not_refused(window, prompt, max_new, q, lag, seed):
    limits = limits_of(q=q, lag=lag, max_model_len=512)
    for pages in range(1, 9):
        driver = Driver("sarathi", limits, groups_of((pages, window)), accept_randomly(seed, q))
        if driver.arrive(1, prompt, max_new=max_new):
            driver.run()
            assert not driver.preempted
            return
    raise AssertionError("refused in a pool that holds every position")


def test_what_can_never_fit_is_refused_with_the_figures():
    driver = Driver(groups=groups_of((64, None), (3, None)))
    assert not driver.arrive(1, 190, max_new=4)
    assert driver.arrive(2, 190, max_new=3)
