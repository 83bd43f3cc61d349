"""Requests that share a prefix run together."""

import pytest

from jaxserve.scheduler import make_policy
from tests.scheduler.driver import Driver, admitted, groups_of, limits_of


def shared_prompts(groups: int, members: int, prefix: int, own: int) -> list[list[int]]:
    """Interleaved: member 0 of each group, member 1 of each, ..."""
    return [
        [*(1000 * g + i for i in range(prefix)), *(10**6 + 1000 * (g * members + m) + i for i in range(own))]
        for m in range(members)
        for g in range(groups)
    ]


@pytest.mark.parametrize("lag", [0, 1])
def test_batchllm_computes_shared_prefixes_once(lag):
    """The pool holds few prefixes at a time, so that in order of arrival each is lost before it is needed again."""
    prompts = shared_prompts(groups=12, members=6, prefix=192, own=40)
    computed = {}
    for name in ("fcfs", "batchllm"):
        driver = Driver(name, limits_of(lag=lag, max_tiles=8, max_num_batched_tokens=600), groups_of((16, None)))
        for seq, prompt in enumerate(prompts):
            driver.arrive(seq, prompt, max_new=3)
        driver.run()
        computed[name] = driver.scheduler.counters["prefill_tokens"]
    optimum = 12 * (192 + 6 * 40)
    assert driver.scheduler.policy.optimum == optimum
    assert computed["batchllm"] == optimum
    assert computed["fcfs"] > 2 * optimum


def test_batchllm_lets_a_job_gather():
    driver = Driver(make_policy("batchllm", gather_s=3.0))
    prompts = shared_prompts(groups=2, members=2, prefix=64, own=10)
    for seq, prompt in enumerate(prompts):
        driver.arrive(seq, prompt, max_new=2)
        assert not driver.step().has_work
        assert driver.scheduler.next_wake == driver.scheduler.view.now + 2.0
    driver.run()
    assert admitted(driver) in ([0, 1, 2, 3], [1, 0, 3, 2], [0, 1, 3, 2], [1, 0, 2, 3])
    assert driver.scheduler.counters["prefill_tokens"] == 2 * (64 + 20)


def test_batchllm_runs_decode_heavy_groups_first():
    driver = Driver("batchllm", limits_of(max_num_seqs=1))
    long, short = shared_prompts(groups=2, members=1, prefix=192, own=10)
    for seq, prompt in ((1, long), (3, [*long[:192], 5])):
        driver.arrive(seq, prompt, max_new=2)
    for seq, prompt in ((2, short), (4, [*short[:192], 5])):
        driver.arrive(seq, prompt, max_new=30)
    driver.run()
    assert admitted(driver) in ([2, 4, 1, 3], [4, 2, 1, 3], [2, 4, 3, 1], [4, 2, 3, 1])


def test_batchllm_waits_for_nobody_who_has_given_up():
    driver = Driver("batchllm", limits_of(max_tiles=1))
    for seq in range(3):
        driver.arrive(seq, [*range(640), seq], max_new=3)
    driver.step()
    driver.abort(driver.plans[0].admits[0].seq)
    driver.run()
