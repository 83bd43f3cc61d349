"""The shortest goes first."""

from tests.scheduler.driver import Driver, admitted, limits_of


def test_srpt_knows_the_shortest():
    driver = Driver("srpt", limits_of(max_num_seqs=1, lag=0))
    for seq, output in ((1, 50), (2, 20), (3, 4)):
        driver.arrive(seq, 10, max_new=100, stop=output, output=output)
        driver.step()
    driver.run()
    assert admitted(driver) == [1, 2, 3, 2, 1]
