"""Classes: arrivals in, order out."""

from tests.scheduler.driver import Driver, limits_of


def test_priority_displaces_a_worse_class_and_never_its_own():
    driver = Driver("priority", limits_of(max_num_seqs=2))
    driver.arrive(1, 10, max_new=50, priority=1)
    driver.arrive(2, 10, max_new=50, priority=2)
    driver.step()
    driver.arrive(3, 10, max_new=5, priority=1)
    driver.arrive(4, 10, max_new=5, priority=1)
    plan = driver.step()
    assert plan.preempted == (2,)
    assert [admit.seq for admit in plan.admits] == [3]
    driver.run()
    assert driver.preempted == [2]
    order = [admit.seq for plan in driver.plans for admit in plan.admits]
    assert order == [1, 2, 3, 4, 2]


def test_priority_orders_the_queue():
    driver = Driver("priority", limits_of(max_num_seqs=1))
    for seq, priority in ((1, 5), (2, 0), (3, 5), (4, -1)):
        driver.arrive(seq, 10, max_new=2, priority=priority)
    driver.run()
    assert [admit.seq for plan in driver.plans for admit in plan.admits] == [4, 2, 1, 3]
