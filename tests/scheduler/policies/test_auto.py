"""The choice follows the lengths of answers."""

import pytest

from jaxserve.scheduler import make_policy
from tests.scheduler.driver import Driver, limits_of


@pytest.mark.parametrize(("lengths", "choice"), [((20, 22, 25), "sarathi"), ((2, 2, 2, 2, 2, 2, 2, 2, 100), "mlfq")])
def test_auto_goes_by_the_spread_of_answers(lengths, choice):
    driver = Driver(make_policy("auto"), limits_of(max_num_seqs=4))
    for seq in range(90):
        driver.arrive(seq, 10, max_new=lengths[seq % len(lengths)])
    driver.run()
    assert driver.scheduler.policy.choice == choice
    assert not driver.scheduler.counters["policy_errors"]
