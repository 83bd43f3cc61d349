"""Pages that go to host memory and come back: what is sent, what is sent again, and when computing is cheaper."""

import pytest

from jaxserve.scheduler import Evict, Policy
from jaxserve.scheduler.host import HostPool
from jaxserve.types import ResetCache
from tests.scheduler.driver import Driver, groups_of, limits_of


class Flip(Policy):
    """Sequence `first` computes alone; another one has to make room."""

    displaces = True

    def __init__(self, how: Evict = Evict.SWAP) -> None:
        self.first = 0
        self.how = how

    def rank(self, view):
        everybody = [*view.residents(), *view.waiting()]
        return iter(sorted(everybody, key=lambda seq: seq.id != self.first)[:1])

    def may_preempt(self, want, victim, view):
        return self.how

    def residency(self, view, planned):
        return ()


def limits(**changes: object):
    wanted = {"max_num_seqs": 1, "max_model_len": 2048, "enable_prefix_caching": False, "host_pages": (64,), "lag": 0}
    return limits_of(**{**wanted, **changes})


def flipping(driver: Driver, policy: Flip, steps: int = 12) -> None:
    """Two sequences of which each needs most of the pool, in turns."""
    driver.arrive(0, 500, max_new=200)
    driver.arrive(1, 500, max_new=200)
    while not all(host.finished for host in driver.hosts.values()):
        for _ in range(steps):
            driver.step()
        policy.first = next((i for i in (1 - policy.first, policy.first) if not driver.hosts[i].finished), 0)
    driver.run()


@pytest.mark.parametrize("move_steps", [1, 3])
@pytest.mark.parametrize("lag", [0, 1])
def test_pages_come_back_from_the_host(lag, move_steps):
    policy = Flip()
    driver = Driver(policy, limits(lag=lag), groups_of((12, None)), move_steps=move_steps)
    flipping(driver, policy)
    counters = driver.scheduler.counters
    assert counters["num_preemptions"] > 4 and counters["swap_in_moves"] > 2
    # Nothing is computed twice but the newest token, and prompts that lost their place before any page was full.
    assert counters["prefill_tokens"] <= 2 * 500 + 2 * counters["num_preemptions"]
    assert not driver.scheduler.moves_under_way


def test_only_what_is_new_is_sent_again():
    policy = Flip()
    driver = Driver(policy, limits(), groups_of((12, None)))
    flipping(driver, policy)
    counters = driver.scheduler.counters
    # Pages of a byte: eight of each prompt once, then the one or two that were written since.
    assert counters["swap_out_bytes"] <= 2 * 8 + 3 * counters["num_preemptions"]
    assert counters["swap_pages_still_valid"] > 3 * counters["num_preemptions"]


def test_a_move_is_one_copy_of_many_pages():
    policy = Flip()
    driver = Driver(policy, limits(host_pages=(64, 64)), groups_of((12, None), (12, None)))
    flipping(driver, policy)
    counters = driver.scheduler.counters
    assert counters["swap_out_moves"] <= 2 * counters["num_preemptions"]
    assert counters["swap_in_bytes"] >= 4 * counters["swap_in_moves"]


@pytest.mark.parametrize(("how", "link"), [(Evict.RECOMPUTE, 24e9), (Evict.SWAP, 1.0)])
def test_what_is_cheaper_to_compute_is_not_moved(how, link):
    """A byte a page over a link of one byte a second; eight pages are computed in a fraction of that."""
    policy = Flip(how)
    driver = Driver(policy, limits(host_link_bytes_s=link), groups_of((12, None)))
    flipping(driver, policy)
    assert driver.scheduler.counters["swap_out_moves"] == 0
    assert driver.scheduler.counters["prefill_tokens"] > 3 * 500


def test_a_sequence_whose_pages_are_on_their_way_does_not_run():
    policy = Flip()
    driver = Driver(policy, limits(), groups_of((12, None)), move_steps=5)
    driver.arrive(0, 500, max_new=200)
    driver.arrive(1, 500, max_new=200)
    for _ in range(6):
        driver.step()
    policy.first = 1
    for _ in range(10):
        driver.step()
    policy.first = 0
    seen = []
    while not any(admit.seq == 0 for admit in driver.plans[-1].admits):
        driver.step()
        seen.append([move.kind for move in driver.plans[-1].moves])
    assert sum("in" in kinds for kinds in seen) == 1 and len(seen) >= 6
    driver.run()


def test_an_abort_on_the_way_loses_nothing():
    for when in range(12):
        policy = Flip()
        driver = Driver(policy, limits(), groups_of((12, None)), move_steps=3)
        driver.arrive(0, 500, max_new=60)
        driver.arrive(1, 500, max_new=60)
        for step in range(40):
            policy.first = step // 8 % 2
            driver.step()
            if step == 14 + when:
                driver.abort(step % 2)
                policy.first = 1 - step % 2
                break
        policy.first = next(i for i in (0, 1) if not driver.hosts[i].finished)
        driver.run()
        for _ in range(4):
            driver.step()
        assert driver.scheduler.gauges["swap_usage_perc"] == 0.0


def test_a_reset_makes_what_is_on_its_way_worthless():
    policy = Flip()
    driver = Driver(policy, limits(), groups_of((12, None)), move_steps=3)
    driver.arrive(0, 500, max_new=60)
    driver.arrive(1, 500, max_new=60)
    for step in range(40):
        policy.first = step // 8 % 2
        driver.step()
        if step % 5 == 0:
            driver.scheduler.on_event(ResetCache(now=float(step)))
            driver.scheduler.check_integrity()
    policy.first = next((i for i in (0, 1) if not driver.hosts[i].finished), 0)
    while not driver.hosts[policy.first].finished:
        driver.step()
    policy.first = 1 - policy.first
    driver.run()


def test_host_pools_must_match():
    with pytest.raises(ValueError, match="host_pages has 2 pools"):
        Driver(limits=limits(host_pages=(4, 4)))


def test_a_full_host_forgets_what_was_used_longest_ago():
    host = HostPool(2)
    for name in (b"a", b"b"):
        assert host.reserve(name) is not None
    assert host.reserve(b"c") is None, "both are on their way"
    host.arrived(b"a")
    host.arrived(b"b")
    host.hold(b"a")
    assert host.reserve(b"c") is not None
    assert host.find(b"a") is not None and host.find(b"b") is None and host.find(b"c") is None
    host.forget(b"a")
    assert host.find(b"a") is None and host.used == 2
    host.let_go(b"a")
    assert host.used == 1
    host.check("host")
