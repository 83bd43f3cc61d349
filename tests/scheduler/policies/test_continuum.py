"""Programs in order of their first turn, and how long they hold what they have."""

import pytest

from jaxserve.scheduler import make_policy
from tests.scheduler.driver import Driver, admitted, groups_of, limits_of


def test_continuum_goes_by_the_programs_first_turn_and_pins():
    driver = Driver("continuum", limits_of(max_num_seqs=1, pin_share=1.0))
    driver.arrive(1, 10, max_new=2, program="old", tool="t")
    driver.run()
    driver.arrive(2, 10, max_new=30)
    driver.step()
    driver.arrive(3, 10, max_new=2, program="new")
    driver.arrive(4, [*driver.hosts[1].tokens, 1], max_new=2, program="old", tool="t")
    driver.run()
    assert admitted(driver) == [1, 2, 4, 3]


def scripted(policy: str, tool_s: int, turns: int, **fields: object) -> tuple[Driver, list[float]]:
    """Programs whose tool takes `tool_s` steps; how long each pin was to hold."""
    driver = Driver(make_policy(policy, few=3), limits_of(pin_share=1.0, max_model_len=4096), groups_of((200, None)))
    holds = []
    for seq in range(turns):
        previous = driver.hosts[seq - 1].tokens if seq else [7]
        driver.arrive(seq, [*previous, seq], max_new=60, program="p", tool="t", **fields)
        driver.run()
        pin = driver.scheduler.view.pin("p")
        holds.append(pin.expires - pin.since if pin is not None else 0.0)
        for _ in range(tool_s):
            driver.step()
    return driver, holds


def test_continuum_holds_as_long_as_tools_take_when_that_pays():
    driver, holds = scripted("continuum", tool_s=1, turns=8)
    assert holds[:3] == [2.0] * 3  # nothing is known of the tool
    assert all(hold in (0.0, 2.0, 1.0) or 0 < hold <= 2.0 for hold in holds[3:])
    driver.scheduler.policy._queued_s = 100.0
    seq = next(iter(driver.hosts.values()))
    assert seq is not None
    driver.arrive(99, [*driver.hosts[7].tokens, 9], max_new=4, program="p", tool="t")
    driver.run()
    pin = driver.scheduler.view.pin("p")
    assert pin.expires - pin.since == pytest.approx(1.0, abs=1.1)


def test_continuum_gives_up_pins_of_tools_that_take_too_long():
    driver, holds = scripted("continuum", tool_s=50, turns=8)
    assert holds[4:] == [0.0] * 4
    assert driver.hosts[7].cached[0] > 0, "an expired pin is still there as long as nobody needs its pages"


def test_continuum_takes_pages_from_the_newest_program():
    """Unless that is on its last turn. Sequence 0 needs a fourth page when others hold what was left of five."""
    for last, victim in ((True, 1), (False, 2)):
        driver = Driver("continuum", limits_of(enable_prefix_caching=False), groups_of((5, None)))
        driver.arrive(0, 190, max_new=30, program="a")
        driver.arrive(1, 30, max_new=30, program="b")
        driver.arrive(2, 30, max_new=30, program="c", last_turn=last)
        driver.run()
        assert driver.preempted[0] == victim
