"""Short jobs pass long ones that nobody knew to be long."""

from itertools import pairwise

from jaxserve.scheduler import make_policy
from jaxserve.scheduler.policies.mlfq import LIFT_SHARE, LOOKED_AT
from tests.scheduler.driver import Driver, admitted, groups_of, limits_of


def test_mlfq_lets_short_jobs_pass_long_ones():
    driver = Driver("mlfq", limits_of(max_num_seqs=2, lag=0))
    driver.arrive(1, 10, max_new=100)
    driver.arrive(2, 10, max_new=100)
    for _ in range(4):
        driver.step()
    driver.arrive(3, 10, max_new=3)
    plan = driver.step()
    assert [admit.seq for admit in plan.admits] == [3] and plan.preempted == (2,)
    driver.run()


def test_mlfq_demotes_by_quanta_and_joins_by_prompt():
    policy = make_policy("mlfq", first_quantum_s=2.0)
    driver = Driver(policy, limits_of(lag=0, max_model_len=4096), groups_of((80, None)))
    driver.arrive(1, 10, max_new=40)
    levels = []
    for _ in range(16):
        driver.step()
        levels.append(policy.level(1))
    # Each step takes a second: three use up the first quantum, five the second, nine the third.
    assert levels == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    driver.arrive(2, 4000, max_new=5)
    assert policy.level(2) == 0  # 16 steps of 0.02 s and 4000 tokens of 0.1 ms
    driver.run()


def test_mlfq_never_preempts_its_own_level():
    driver = Driver(make_policy("mlfq", first_quantum_s=100.0), limits_of(max_num_seqs=2))
    for seq in range(6):
        driver.arrive(seq, 10, max_new=5)
    driver.run()
    assert not driver.preempted
    assert admitted(driver) == list(range(6))


def test_mlfq_lifts_the_starved_now_and_then():
    policy = make_policy("mlfq", first_quantum_s=2.0, starve_s=20.0, check_every=40)
    driver = Driver(policy, limits_of(max_num_seqs=2, lag=0), groups_of((64, None)))
    driver.arrive(0, 10, max_new=60)
    driver.arrive(1, 10, max_new=60)
    for seq in range(2, 40):
        for _ in range(4):
            driver.step()
        driver.arrive(seq, 10, max_new=8)
    waited = next(i for i, plan in enumerate(driver.plans) if plan.preempted)
    again = [i for i, plan in enumerate(driver.plans) if i > waited and any(a.seq in (0, 1) for a in plan.admits)]
    assert again and again[0] - waited <= 20 + 40 + 8
    driver.run()


def test_mlfq_looks_for_the_starved_seldom_enough_to_get_on():
    """More long jobs than slots: checked at every step, they chase each other out (a swap storm)."""
    preempted = {}
    for check_every in (1, 100):
        policy = make_policy("mlfq", first_quantum_s=2.0, starve_s=5.0, check_every=check_every)
        driver = Driver(policy, limits_of(max_num_seqs=2, lag=0), groups_of((64, None)))
        for seq in range(12):
            driver.arrive(seq, 500, max_new=60)
        driver.run()
        preempted[check_every] = len(driver.preempted)
    assert preempted[1] > 2 * preempted[100]


def test_mlfq_starts_no_more_than_memory_holds():
    """Twenty jobs that want a quarter of the pages each: what is started is not computed again and again."""
    policy = make_policy("mlfq", first_quantum_s=2.0)
    driver = Driver(policy, limits_of(max_num_seqs=2, enable_prefix_caching=False), groups_of((20, None)))
    for seq in range(20):
        driver.arrive(seq, 280, max_new=40)
    driver.run()
    assert len(driver.preempted) > 5
    assert driver.scheduler.counters["prefill_tokens"] < 1.2 * 20 * 280


def test_mlfq_lifts_a_long_queue_a_few_at_a_time():
    """All who wait are starved at once; no step pays for all of them."""
    policy = make_policy("mlfq", first_quantum_s=0.02, starve_s=20.0, check_every=30)
    driver = Driver(policy, limits_of(max_num_seqs=1, lag=0, max_model_len=4096), groups_of((80, None)))
    driver.arrive(0, 10, max_new=400)
    waiting = range(1, 201)
    for seq in waiting:
        driver.arrive(seq, 1000, max_new=400)
    lifted: set[int] = set()
    sizes = []
    for _ in range(210):
        driver.step()
        lifted |= {seq for seq in waiting if policy.level(seq) == 0}
        sizes.append(len(lifted))
    # Some have had their turn at the top by then, and sunk again within the step.
    assert sizes[28] == 0 and sizes[-1] >= len(waiting) - 30
    assert max(after - before for before, after in pairwise(sizes)) == LOOKED_AT
    # Steps take a second, tiles 6.4 ms more: so many of them are a hundredth of the 30 s between two checks.
    between = [after - before for before, after in pairwise(sizes[28::30])]
    assert 30 < max(between) <= LIFT_SHARE * 30 / (64 * 1e-4)
