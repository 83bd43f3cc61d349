"""Tenants get their shares."""

import pytest

from jaxserve.scheduler import make_policy
from tests.scheduler.driver import Driver, admitted, groups_of, limits_of


def test_fairness_serves_the_tenant_that_was_served_least():
    driver = Driver("fairness", limits_of(max_num_seqs=1))
    for seq in range(6):
        driver.arrive(seq, 64, max_new=4, tenant="flood")
    driver.step()
    driver.arrive(6, 64, max_new=4, tenant="calm")
    driver.arrive(7, 64, max_new=4, tenant="calm")
    driver.run()
    assert admitted(driver) == [0, 6, 1, 7, 2, 3, 4, 5]


@pytest.mark.parametrize("weights", [None, {"a": 2.0}])
def test_fairness_shares_by_weight_whatever_the_neighbour_sends(weights):
    """Two tenants that always have something waiting, one with longer requests and ten times as many."""
    policy = make_policy("fairness", weights=weights)
    driver = Driver(policy, limits_of(max_num_seqs=4), groups_of((64, None)))
    for seq in range(1000):
        flood = seq % 10 != 0
        driver.arrive(seq, 200 if flood else 50, max_new=30 if flood else 20, tenant="b" if flood else "a")
    while sum(not host.finished and host.prompt == 50 for host in driver.hosts.values()) > 8:
        driver.step()
    ratio = policy.service("a") * (2.0 if weights else 1.0) / policy.service("b")
    assert ratio == pytest.approx(2.0 if weights else 1.0, rel=0.1)


def test_fairness_saves_nothing_up_for_idle_tenants():
    driver = Driver("fairness", limits_of(max_num_seqs=1))
    driver.arrive(0, 64, max_new=2, tenant="late")
    driver.run()
    for seq in range(1, 9):
        driver.arrive(seq, 64, max_new=8, tenant="busy")
    for _ in range(40):
        driver.step()
    for seq in range(10, 16):
        driver.arrive(seq, 64, max_new=8, tenant="late")
    driver.run()
    order = admitted(driver)
    first = order.index(10)
    assert sorted("busy" if seq < 10 else "late" for seq in order[first : first + 4]) == ["busy"] * 2 + ["late"] * 2
