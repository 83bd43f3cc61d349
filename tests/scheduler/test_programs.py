"""What a program holds between its turns, for how long, against whom, and that it is the right content."""

import pytest

from jaxserve.scheduler import Policy
from jaxserve.types import ResetCache
from tests.scheduler.driver import Driver, groups_of, limits_of


def limits(**changes: object):
    return limits_of(**{"enable_prefix_caching": False, "pin_share": 1.0, **changes})


def turn(driver: Driver, seq: int, prompt: list[int] | int, program: str = "p", **fields: object) -> None:
    driver.arrive(seq, prompt, program=program, **{"max_new": 5, **fields})
    driver.run()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [1, 60, 64, 100, 124])
def test_the_next_turn_computes_only_what_is_new(length, caching, lag):
    """The KV of the newest token does not exist when a turn ends, so it is computed again."""
    driver = Driver(limits=limits(enable_prefix_caching=caching, lag=lag))
    turn(driver, 1, length)
    turn(driver, 2, [*driver.hosts[1].tokens, 1, 2, 3])
    assert driver.hosts[2].cached == [length + 4]
    assert driver.scheduler.counters["program_tokens_reused"] == length + 4
    assert driver.scheduler.counters["prefill_tokens"] == length + 4


def test_golden_answers_share_what_comes_before_them():
    driver = Driver(limits=limits())
    turn(driver, 1, 100, max_new=40)
    turn(driver, 2, [*driver.hosts[1].tokens[:110], 1, 2, 3])
    assert driver.hosts[2].cached == [110]


def test_a_full_page_that_was_published_is_copied_before_it_is_written():
    """The next turn goes another way inside page 1, whose content others may still find in the prefix index."""
    driver = Driver(limits=limits(enable_prefix_caching=True))
    turn(driver, 1, 100, max_new=60)
    turn(driver, 2, [*driver.hosts[1].tokens[:90], *range(60)])
    driver.arrive(3, [*driver.hosts[1].tokens, 7])
    driver.run()
    assert driver.hosts[2].cached == [90]
    assert driver.hosts[3].cached == [128]


def test_a_turn_that_begins_otherwise_starts_afresh_and_ends_the_pin():
    driver = Driver(limits=limits())
    turn(driver, 1, 100)
    driver.arrive(2, 50, program="p", last_turn=True)
    assert driver.scheduler.view.free(0) == 64
    driver.run()
    assert driver.hosts[2].cached == [0]
    assert driver.scheduler.pinned("p") is None


def test_the_last_turn_holds_nothing():
    driver = Driver(limits=limits())
    turn(driver, 1, 100)
    turn(driver, 2, [*driver.hosts[1].tokens, 1], last_turn=True)
    assert driver.hosts[2].cached == [104]
    assert driver.scheduler.view.free(0) == 64


def test_a_closed_program_holds_nothing():
    driver = Driver(limits=limits())
    turn(driver, 1, 100)
    assert driver.scheduler.view.free(0) == 62
    driver.close("p")
    assert driver.scheduler.view.free(0) == 64
    turn(driver, 2, [*driver.hosts[1].tokens, 1])
    assert driver.hosts[2].cached == [0]


def test_a_turn_that_its_client_stops_is_a_turn():
    driver = Driver(limits=limits(lag=1))
    driver.arrive(1, 100, max_new=50, program="p")
    while driver.hosts[1].generated < 10:
        driver.step()
    driver.abort(1)
    turn(driver, 2, [*driver.hosts[1].tokens[:107], 1, 2])
    assert driver.hosts[2].cached == [107]


@pytest.mark.parametrize("caching", [True, False])
def test_an_expired_pin_is_lost_only_to_who_needs_its_pages(caching):
    for wanted, cached in ((20 * 64, [104]), (23 * 64, [64]), (24 * 64, [0])):
        driver = Driver(
            limits=limits(enable_prefix_caching=caching, pin_ttl_s=3.0, max_model_len=2048),
            groups=groups_of((24, None)),
        )
        turn(driver, 1, 100)
        assert driver.scheduler.view.free(0) == 22
        turn(driver, 8, 10, program="", max_new=8)
        assert driver.scheduler.view.free(0) == 24
        turn(driver, 9, wanted - 1, program="", max_new=1)
        turn(driver, 2, [*driver.hosts[1].tokens, 1])
        assert driver.hosts[2].cached == cached


def test_a_turn_that_waits_keeps_its_pin():
    driver = Driver(limits=limits(max_num_seqs=1, pin_ttl_s=10.0), groups=groups_of((9, None)))
    turn(driver, 1, 100)
    driver.arrive(8, 300, max_new=100)
    driver.step()
    driver.arrive(2, [*driver.hosts[1].tokens, 1], program="p")
    for _ in range(30):
        driver.step()
    assert driver.scheduler.gauges["num_programs_pinned"] == 1
    driver.run()
    assert driver.hosts[2].cached == [104]


def test_when_the_turn_that_waited_is_aborted_time_is_up():
    driver = Driver(limits=limits(max_num_seqs=1, pin_ttl_s=10.0))
    turn(driver, 1, 100)
    driver.arrive(8, 300, max_new=100)
    driver.step()
    driver.arrive(2, [*driver.hosts[1].tokens, 1], program="p")
    for _ in range(30):
        driver.step()
    driver.abort(2)
    driver.step()
    assert driver.scheduler.gauges["num_programs_pinned"] == 0


def test_pins_above_their_share_become_evictable_the_longest_idle_first():
    driver = Driver(limits=limits(pin_share=0.5), groups=groups_of((8, None)))
    for seq in (1, 2, 3):
        turn(driver, seq, 100, program=str(seq))
    assert driver.scheduler.view.free(0) == 4
    assert [pin.program for pin in driver.scheduler.view.pins()] == ["2", "3"]
    turn(driver, 4, [*driver.hosts[1].tokens, 1], program="1")
    assert driver.hosts[4].cached == [104]  # nobody had needed the room


def test_who_runs_takes_pages_from_pins_before_it_takes_them_from_others():
    driver = Driver(limits=limits(), groups=groups_of((8, None)))
    turn(driver, 1, 100)
    for seq in (8, 9):
        driver.arrive(seq, 60, max_new=190)
    driver.run()
    assert not driver.preempted


class Loyal(Policy):
    """Arrival order; nobody yields and programs keep what they have."""

    def rank(self, view):
        yield from view.residents()
        yield from view.waiting()

    def may_preempt(self, want, victim, view):
        return None

    def may_unpin(self, want, pin, view):
        return False


@pytest.mark.parametrize("policy", ["sarathi", "fcfs", "static", Loyal])
def test_a_program_that_never_comes_back_blocks_nobody(policy):
    driver = Driver(policy if isinstance(policy, str) else policy(), limits(pin_ttl_s=1e9), groups_of((8, None)))
    for seq in (1, 2, 3):
        turn(driver, seq, 130, program=str(seq))
    for seq in (7, 8, 9):
        driver.arrive(seq, 130, max_new=200)
    driver.run()


@pytest.mark.parametrize("pages", range(4, 9))
def test_a_sequence_that_fits_only_alone_runs_whatever_its_own_program_holds(pages):
    driver = Driver(limits=limits(pin_ttl_s=1e9), groups=groups_of((pages, None)))
    turn(driver, 1, 64 * pages - 100, max_new=40)
    turn(driver, 2, [*driver.hosts[1].tokens[:-30], *range(20)], max_new=20)
    turn(driver, 3, [*driver.hosts[2].tokens[:-30], *range(20)], max_new=20)
    assert driver.hosts[3].generated == 20


def test_a_reset_takes_what_programs_hold():
    driver = Driver(limits=limits())
    turn(driver, 1, 100)
    driver.scheduler.on_event(ResetCache(now=0.0))
    driver.scheduler.check_integrity()
    turn(driver, 2, [*driver.hosts[1].tokens, 1])
    assert driver.hosts[2].cached == [0]


def test_a_windowed_group_that_has_moved_on_has_nothing_to_share():
    driver = Driver(limits=limits(), groups=groups_of((40, None), (40, 64)))
    turn(driver, 1, 100, max_new=200)
    turn(driver, 2, [*driver.hosts[1].tokens, 1])
    assert driver.hosts[2].cached == [299]
    turn(driver, 3, [*driver.hosts[1].tokens[:120], 1])
    assert driver.hosts[3].cached == [0]


def test_programs_that_never_come_back_are_forgotten():
    driver = Driver(limits=limits(pin_ttl_s=0.0), groups=groups_of((8, None)))
    for seq in range(100):
        turn(driver, seq, 100, program=str(seq))
    assert sum(driver.scheduler.pinned(str(seq)) is not None for seq in range(100)) < 30
