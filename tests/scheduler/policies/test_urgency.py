"""Who must start soonest goes first."""

from tests.scheduler.driver import Driver, admitted, limits_of


def test_urgency_orders_by_slack():
    driver = Driver("urgency", limits_of(max_num_seqs=1))
    for seq, deadline in ((1, 5.0), (2, None), (3, 400.0), (4, 50.0)):
        driver.arrive(seq, 10, max_new=2, deadline=deadline)
    driver.run()
    assert admitted(driver) == [1, 4, 2, 3]


def test_urgency_displaces_only_who_has_time_for_who_has_none():
    driver = Driver("urgency", limits_of(max_num_seqs=1))
    driver.arrive(1, 10, max_new=60, deadline=1000.0)
    for _ in range(5):
        driver.step()
    driver.arrive(2, 10, max_new=2, deadline=500.0)
    driver.step()
    assert not driver.preempted
    driver.arrive(3, 10, max_new=2, deadline=9.0)
    driver.step()
    assert driver.preempted == [1]
    driver.run()
    assert admitted(driver) == [1, 3, 2, 1]
