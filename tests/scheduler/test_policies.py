"""Arrivals in, order out."""

import pytest

from jaxserve.scheduler import Policy, make_policy, policies
from tests.scheduler.driver import Driver, groups_of, limits_of


def shape(driver: Driver, steps: int) -> list[tuple[list[int], list[int]]]:
    """Per step: sequences with a decode row, and sequences with tiles (once a tile)."""
    plans = [driver.step() for _ in range(steps)]
    return [([work.seq for work in plan.decode], [work.seq for work in plan.prefill]) for plan in plans]


def test_sarathi_fills_the_budget_with_decodes_then_started_prompts_then_new_ones():
    driver = Driver("sarathi", limits_of(max_num_batched_tokens=3 * 64 + 2, max_tiles=4))
    driver.arrive(1, 64)
    driver.arrive(2, 5 * 64)
    driver.arrive(3, 64)
    assert shape(driver, 4) == [
        ([], [1, 2, 2]),
        ([1], [2, 2, 2]),
        ([1, 2], [3]),
        ([1, 2, 3], []),
    ]


def test_sarathi_never_lets_a_decode_wait():
    driver = Driver("sarathi", limits_of(max_model_len=4096), groups_of((80, None)))
    driver.arrive(1, 10, max_new=40)
    driver.step()
    driver.arrive(2, 4000, max_new=5)
    assert all(1 in decode for decode, _ in shape(driver, 30))


def test_fcfs_computes_whole_prompts_first():
    driver = Driver("fcfs", limits_of(max_num_batched_tokens=4 * 64))
    driver.arrive(1, 2 * 64)
    driver.arrive(2, 3 * 64)
    driver.arrive(3, 64)
    # 2 does not fit whole beside 1, and 3 does not overtake it.
    assert shape(driver, 3) == [([], [1, 1]), ([], [2, 2, 2, 3]), ([1, 2, 3], [])]


def test_fcfs_splits_only_what_fits_no_step():
    driver = Driver("fcfs", limits_of(max_num_batched_tokens=4 * 64))
    driver.arrive(1, 6 * 64)
    driver.arrive(2, 64)
    assert shape(driver, 3) == [([], [1] * 4), ([], [1, 1, 2]), ([1, 2], [])]


def test_static_starts_the_next_batch_when_the_last_has_finished():
    driver = Driver("static", limits_of(max_num_seqs=2, lag=0))
    for seq, max_new in ((1, 2), (2, 6), (3, 2)):
        driver.arrive(seq, 10, max_new=max_new)
    assert shape(driver, 7) == [
        ([], [1, 2]),
        ([1, 2], []),
        *[([2], [])] * 4,
        ([], [3]),
    ]


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


def test_unknown_names_and_parameters_are_refused():
    with pytest.raises(ValueError, match="'nobody'.*sarathi"):
        make_policy("nobody")
    with pytest.raises(ValueError, match="'mlfq' goes over no other.*slora"):
        make_policy("mlfq+fcfs")
    with pytest.raises(ValueError, match="sarathi.*argument"):
        make_policy("sarathi", budget=3)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="sarathi"):
        policies.register("sarathi")(type(make_policy("fcfs")))


def admitted(driver: Driver) -> list[int]:
    return [admit.seq for plan in driver.plans for admit in plan.admits]


# fairness


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


# mlfq


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


# batchllm


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


# continuum


def test_continuum_goes_by_the_programs_first_turn_and_pins():
    driver = Driver("continuum", limits_of(max_num_seqs=1, pin_share=1.0))
    driver.arrive(1, 10, max_new=2, program="old", tool="t")
    driver.run()
    driver.arrive(2, 10, max_new=30)
    driver.step()
    driver.arrive(3, 10, max_new=2, program="new")
    driver.arrive(4, [*driver.hosts[1].tokens, 1], max_new=2, program="old", tool="t")
    driver.run()
    assert admitted(driver) == [1, 2, 4, 3]


def scripted(policy: str, tool_s: int, turns: int, **fields: object) -> tuple[Driver, list[float]]:
    """Programs whose tool takes `tool_s` steps; how long each pin was to hold."""
    driver = Driver(make_policy(policy, few=3), limits_of(pin_share=1.0, max_model_len=4096), groups_of((200, None)))
    holds = []
    for seq in range(turns):
        previous = driver.hosts[seq - 1].tokens if seq else [7]
        driver.arrive(seq, [*previous, seq], max_new=60, program="p", tool="t", **fields)
        driver.run()
        pin = driver.scheduler.view.pin("p")
        holds.append(pin.expires - pin.since if pin is not None else 0.0)
        for _ in range(tool_s):
            driver.step()
    return driver, holds


def test_continuum_holds_as_long_as_tools_take_when_that_pays():
    driver, holds = scripted("continuum", tool_s=1, turns=8)
    assert holds[:3] == [2.0] * 3  # nothing is known of the tool
    assert all(hold in (0.0, 2.0, 1.0) or 0 < hold <= 2.0 for hold in holds[3:])
    driver.scheduler.policy._queued_s = 100.0
    seq = next(iter(driver.hosts.values()))
    assert seq is not None
    driver.arrive(99, [*driver.hosts[7].tokens, 9], max_new=4, program="p", tool="t")
    driver.run()
    pin = driver.scheduler.view.pin("p")
    assert pin.expires - pin.since == pytest.approx(1.0, abs=1.1)


def test_continuum_gives_up_pins_of_tools_that_take_too_long():
    driver, holds = scripted("continuum", tool_s=50, turns=8)
    assert holds[4:] == [0.0] * 4
    assert driver.hosts[7].cached[0] > 0, "an expired pin is still there as long as nobody needs its pages"


def test_continuum_takes_pages_from_the_newest_program():
    """Unless that is on its last turn. Sequence 0 needs a fourth page when others hold what was left of five."""
    for last, victim in ((True, 1), (False, 2)):
        driver = Driver("continuum", limits_of(enable_prefix_caching=False), groups_of((5, None)))
        driver.arrive(0, 190, max_new=30, program="a")
        driver.arrive(1, 30, max_new=30, program="b")
        driver.arrive(2, 30, max_new=30, program="c", last_turn=last)
        driver.run()
        assert driver.preempted[0] == victim


# urgency


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


# auto


@pytest.mark.parametrize(("lengths", "choice"), [((20, 22, 25), "sarathi"), ((2, 2, 2, 2, 2, 2, 2, 2, 100), "mlfq")])
def test_auto_goes_by_the_spread_of_answers(lengths, choice):
    driver = Driver(make_policy("auto"), limits_of(max_num_seqs=4))
    for seq in range(90):
        driver.arrive(seq, 10, max_new=lengths[seq % len(lengths)])
    driver.run()
    assert driver.scheduler.policy.choice == choice
    assert not driver.scheduler.counters["policy_errors"]


# slora


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


# srpt


def test_srpt_knows_the_shortest():
    driver = Driver("srpt", limits_of(max_num_seqs=1, lag=0))
    for seq, output in ((1, 50), (2, 20), (3, 4)):
        driver.arrive(seq, 10, max_new=100, stop=output, output=output)
        driver.step()
    driver.run()
    assert admitted(driver) == [1, 2, 3, 2, 1]


# prepacking


def test_prepacking_fills_tile_buckets():
    limits = limits_of(max_num_seqs=8, max_tiles=8, max_num_batched_tokens=600, tile_buckets=(1, 2, 4, 8))
    seen = {}
    for name in ("sarathi", "prepacking"):
        driver = Driver(name, limits)
        for seq, tiles in enumerate((3, 2, 1, 1)):
            driver.arrive(seq, 64 * tiles, max_new=2)
        driver.run()
        seen[name] = [len(plan.prefill) for plan in driver.plans if plan.prefill]
    assert seen["sarathi"] == [7]
    assert seen["prepacking"] == [4, 2, 1]


def test_prepacking_prefers_whole_prompts():
    driver = Driver("prepacking", limits_of(max_num_seqs=8))
    for seq, tiles in enumerate((3, 3, 1)):
        driver.arrive(seq, 64 * tiles, max_new=2)
    assert [work.seq for work in driver.step().prefill] == [0, 0, 0, 2]


def test_prepacking_goes_on_with_a_prompt_that_holds_the_pages_which_a_shorter_one_wants():
    driver = Driver(
        "prepacking", limits_of(max_num_seqs=2, max_num_batched_tokens=64, max_tiles=1), groups_of((4, None))
    )
    driver.arrive(0, 3 * 64, max_new=2)
    driver.step()
    driver.arrive(1, 60, max_new=2)
    driver.run()
    assert driver.plans[1].prefill[0].seq == 0


# All


class Failing(Policy):
    """Raises at the n-th question of a kind."""

    displaces = True

    def __init__(self, hook: str, every: int) -> None:
        self.hook = hook
        self.every = every
        self._asked = 0

    def _maybe_raise(self, hook: str) -> None:
        if hook == self.hook:
            self._asked += 1
            if self._asked % self.every == 0:
                raise RuntimeError(f"no {hook}")

    def on_event(self, event, view):
        self._maybe_raise("on_event")

    def on_plan(self, plan, view):
        self._maybe_raise("on_plan")

    def rank(self, view):
        self._maybe_raise("rank")
        for seq in [*view.newest_residents(), *view.waiting()]:
            self._maybe_raise("rank item")
            yield seq

    def tokens(self, seq, left, view):
        self._maybe_raise("tokens")
        return super().tokens(seq, left, view)

    def may_preempt(self, want, victim, view):
        self._maybe_raise("may_preempt")
        return super().may_preempt(want, victim, view)

    def victims(self, view):
        self._maybe_raise("victims")
        return super().victims(view)

    def pin_s(self, seq, view):
        self._maybe_raise("pin_s")
        return super().pin_s(seq, view)

    def next_wake(self, view):
        self._maybe_raise("next_wake")


HOOKS = ["on_event", "on_plan", "rank", "rank item", "tokens", "may_preempt", "victims", "pin_s", "next_wake"]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_policy_that_fails_hurts_nobody(hook, every):
    driver = Driver(Failing(hook, every), limits_of(enable_prefix_caching=False), groups_of((10, None)))
    for seq in range(6):
        driver.arrive(seq, 60, max_new=200, program=str(seq))
        driver.step()
        assert driver.scheduler.next_wake is None
    driver.run()
    assert all(host.generated == 200 for host in driver.hosts.values())
    assert driver.scheduler.counters["policy_errors"] > 0
    assert str(driver.scheduler.policy_error) == f"no {hook}"


@pytest.mark.parametrize("name", ["slora+mlfq", "prepacking+slora+fairness", "mlfq"])
def test_a_record_knows_how_its_policy_was_made(name):
    policy = make_policy(name, **({"levels": 3} if name == "mlfq" else {}))
    assert policy.name == name
    again = make_policy(policy.name, **policy.params)
    assert again.params == policy.params and type(again) is type(policy)
