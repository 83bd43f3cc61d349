"""Policies that displace by a key ask few residents for theirs: the order is that of asking all."""

import random

import pytest

from jaxserve.scheduler import make_policy
from tests.scheduler.driver import Driver, groups_of, limits_of


@pytest.mark.parametrize("name", ["srpt", "urgency"])
def test_victims_come_by_falling_key(name):
    draw, policy = random.Random(0), make_policy(name)
    driver = Driver(policy, limits_of(max_num_seqs=12, max_tiles=8, max_num_batched_tokens=600), groups_of((60, None)))
    compared = 0
    for seq in range(80):
        output = draw.randint(1, 60)
        driver.arrive(seq, draw.randint(1, 200), max_new=output, output=output, deadline=seq + draw.expovariate(1 / 40))
        driver.step()
        view = driver.scheduler.view
        residents = sorted(view.residents(), key=lambda one: (-policy.key(one, view), -one.order))
        victims = list(policy.victims(view))
        assert [one.id for one in victims] == [one.id for one in residents]
        compared += len(victims)
    driver.run()
    assert compared > 300 and driver.preempted
    assert not list(policy.victims(driver.scheduler.view))
