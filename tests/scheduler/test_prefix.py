"""Prefix cache and choices of one request."""

import pytest

from jaxserve.types import ResetCache
from tests.scheduler.driver import Driver, groups_of, limits_of


@pytest.mark.parametrize(("prompt", "cached"), [(63, 0), (64, 0), (65, 64), (128, 64), (129, 128)])
def test_a_hit_is_whole_pages_and_leaves_the_last_token(prompt, cached):
    driver = Driver()
    tokens = list(range(prompt))
    driver.arrive(1, tokens, max_new=1)
    driver.run()
    driver.arrive(2, tokens, max_new=1)
    driver.run()
    assert driver.hosts[2].cached == [cached]
    assert driver.scheduler.counters["prefix_cache_hits"] == cached
    assert driver.scheduler.counters["prefix_cache_queries"] == 2 * prompt


def test_prompt_pages_are_shared_from_the_step_after_the_one_that_computes_them():
    driver = Driver(limits=limits_of(max_tiles=8, max_num_batched_tokens=8 * 64))
    tokens = list(range(200))
    driver.arrive(1, tokens)
    driver.step()
    driver.arrive(2, tokens)
    driver.step()
    assert driver.hosts[2].cached == [192]
    driver.run()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("generated", [27, 28, 29])
def test_the_next_turn_finds_generated_pages_that_are_computed(lag, generated):
    """The newest token's KV does not exist when a sequence ends: its page is full with 129 known tokens."""
    driver = Driver(limits=limits_of(lag=lag))
    driver.arrive(1, 100, max_new=generated)
    driver.run()
    driver.arrive(2, [*driver.hosts[1].tokens, 1, 2, 3], max_new=2)
    driver.run()
    assert driver.hosts[2].cached == [128 if generated == 29 else 64]


@pytest.mark.parametrize("fields", [{"salt": 1}, {"whole_prompt": True}])
def test_who_shares_nothing(fields):
    driver = Driver()
    driver.arrive(1, list(range(200)))
    driver.run()
    driver.arrive(2, list(range(200)), **fields)
    driver.run()
    assert driver.hosts[2].cached == [0]


def test_without_prefix_caching_nothing_is_kept():
    driver = Driver(limits=limits_of(enable_prefix_caching=False))
    for seq in (1, 2):
        driver.arrive(seq, list(range(200)))
        driver.run()
    assert driver.hosts[2].cached == [0]
    assert driver.scheduler.counters["prefix_cache_queries"] == 0


def test_reset_forgets_what_is_cached():
    driver = Driver()
    driver.arrive(1, list(range(200)))
    driver.run()
    driver.scheduler.on_event(ResetCache(now=0.0))
    driver.scheduler.check_integrity()
    driver.arrive(2, list(range(200)))
    driver.run()
    assert driver.hosts[2].cached == [0]


def test_the_end_of_a_chain_is_evicted_before_its_beginning():
    driver = Driver(groups=groups_of((6, None)))
    driver.arrive(1, list(range(4 * 64)), max_new=1)
    driver.run()
    driver.arrive(2, 3 * 64 + 1, max_new=1)  # takes the two free pages and two of the four cached ones
    driver.run()
    driver.arrive(3, list(range(4 * 64)), max_new=1)
    driver.run()
    assert driver.hosts[3].cached == [128]


def test_a_windowed_group_needs_only_the_pages_that_the_next_token_reads():
    """Pages 0 and 1 of the windowed group are evicted; a window of 64 at position 256 reads pages 3 and 4 only."""
    driver = Driver(limits=limits_of(max_num_seqs=1), groups=groups_of((40, None), (8, 64)))
    tokens = list(range(260))
    driver.arrive(1, tokens, max_new=1)
    driver.run()
    driver.arrive(2, 5 * 64 + 1, max_new=1)
    driver.run()
    driver.arrive(3, tokens, max_new=1)
    driver.run()
    assert driver.hosts[3].cached == [256]


@pytest.mark.parametrize(("prompt", "copies"), [(65, 0), (129, 0), (100, 1), (128, 1), (2, 1), (1, 0)])
@pytest.mark.parametrize("caching", [True, False])
def test_choices_compute_the_prompt_once(prompt, copies, caching):
    driver = Driver(limits=limits_of(enable_prefix_caching=caching))
    driver.arrive(1, range(prompt), max_new=5)
    driver.arrive(2, range(prompt), max_new=5, parent=1, choice=1)
    driver.arrive(3, range(prompt), max_new=5, parent=1, choice=2)
    driver.run()
    assert [driver.hosts[seq].cached for seq in (2, 3)] == [[prompt - 1]] * 2
    assert sum(len(plan.pages.copies) for plan in driver.plans) == 2 * copies
    assert driver.scheduler.counters["prefill_tokens"] == prompt + 2
    assert driver.hosts[1].tokens != driver.hosts[2].tokens != driver.hosts[3].tokens


def test_a_choice_shares_with_any_other_that_still_runs():
    driver = Driver(limits=limits_of(max_num_seqs=2, enable_prefix_caching=False))
    driver.arrive(1, range(100), max_new=40, stop=3)
    driver.arrive(2, range(100), max_new=40, parent=1, choice=1)
    driver.arrive(3, range(100), max_new=40, parent=1, choice=2)
    driver.run()
    assert driver.hosts[3].cached == [99]


def test_when_the_parent_is_gone_one_choice_computes_the_prompt_for_the_others():
    driver = Driver(limits=limits_of(max_tiles=1, enable_prefix_caching=False))
    for choice in range(3):
        driver.arrive(choice, range(200), parent=0 if choice else None, choice=choice)
    driver.step()
    driver.abort(0)
    driver.run()
    assert [driver.hosts[seq].cached for seq in (1, 2)] == [[0], [199]]


def test_an_aborted_choice_does_not_hurry_the_others():
    driver = Driver(limits=limits_of(max_tiles=1, enable_prefix_caching=False))
    for choice in range(3):
        driver.arrive(choice, range(200), parent=0 if choice else None, choice=choice)
    driver.step()
    driver.abort(2)
    driver.run()
    assert driver.hosts[1].cached == [199]


def test_a_choice_behind_the_donors_window_computes_its_own_prompt():
    driver = Driver(
        limits=limits_of(max_num_seqs=2, enable_prefix_caching=False), groups=groups_of((40, None), (40, 64))
    )
    driver.arrive(1, range(100), max_new=300)
    driver.arrive(9, 10, max_new=200)  # holds the second slot until the donor's window has moved on
    driver.arrive(2, range(100), max_new=5, parent=1, choice=1)
    driver.run()
    assert driver.hosts[2].cached == [0]
