"""Nobody is admitted who would not fit to the end."""

from tests.scheduler.driver import Driver, groups_of, limits_of


def test_slora_admits_only_what_will_fit_to_the_end():
    """Ten pages; each sequence will hold five."""
    driver = Driver("slora", limits_of(enable_prefix_caching=False, watermark=0.0), groups_of((10, None)))
    for seq in range(4):
        driver.arrive(seq, 60, max_new=250)
    driver.run()
    assert not driver.preempted
    assert [len(plan.admits) for plan in driver.plans if plan.admits] == [2, 2]


def test_slora_counts_on_who_ends_first():
    """Nine pages: one of 300 tokens beside others that end before it has grown."""
    driver = Driver("slora", limits_of(enable_prefix_caching=False, watermark=0.0), groups_of((9, None)))
    driver.arrive(0, 60, max_new=240)
    for seq in (1, 2, 3):
        driver.arrive(seq, 100, max_new=10)
    driver.step()
    driver.step()
    assert driver.scheduler.view.num_residents == 4
    driver.run()
    assert not driver.preempted
