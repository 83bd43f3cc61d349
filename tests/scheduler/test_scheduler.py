"""The contract with the engine: what is refused, what is counted, what is recorded."""

from io import BytesIO

import pytest

from jaxserve.scheduler import Limits, Recorder, ReplayError, Scheduler, make_policy, replay
from jaxserve.types import (
    Arrive,
    CostUpdate,
    MoveDone,
    PageClass,
    PageClasses,
    Plan,
    SeqResult,
    StepDone,
    Tick,
)
from tests.scheduler.chaos import Chaos
from tests.scheduler.driver import Driver, groups_of, limits_of


def scheduler(**limits: object) -> Scheduler:
    return Scheduler(make_policy("sarathi"), limits_of(**limits), groups_of((64, None)))


def arrive(seq: int, prompt: int = 10, max_new: int = 5, **fields: object) -> Arrive:
    return Arrive(now=0.0, seq=seq, prompt=prompt, max_new=max_new, **fields)  # type: ignore[arg-type]


def done(plan: Plan, *results: SeqResult) -> StepDone:
    return StepDone(now=0.0, step=plan.step, duration=0.1, results=results)


@pytest.mark.parametrize(
    ("classes", "fields"),
    [(("bf16", "kivi"), {"sink_pages": 1}), (("a", "b", "c"), {"residual_pages": 1}), (("bf16",), {"window": 0})],
)
def test_groups_that_cannot_be_accounted_for_are_refused(classes, fields):
    made = tuple(PageClass(name=name, pages=4, bytes=2) for name in classes)
    with pytest.raises(ValueError, match=", ".join(classes) if "window" not in fields else "window of 0"):
        Scheduler(make_policy("sarathi"), limits_of(), (PageClasses(classes=made, **fields),))


@pytest.mark.parametrize(
    "changes",
    [
        {"q": 0},
        {"lag": 2},
        {"watermark": 1.0},
        {"max_num_batched_tokens": 63},
        {"max_num_seqs": 0},
        {"pin_share": 2.0},
        {"pin_ttl_s": -1.0},
    ],
)
def test_impossible_limits_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        limits_of(**changes)


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (arrive(1), "second time"),
        (arrive(2, max_new=0), "at least 1"),
        (arrive(2, prompt=1025), "model length"),
        (arrive(2, hashes=(b"x",)), "0 full pages"),
        (arrive(2, prompt=11, parent=1), "parent"),
        (arrive(2, program="p", shared=3), "shares 3 of 10"),
        (MoveDone(now=0.0, move=3), "move 3"),
        (StepDone(now=0.0, step=5, duration=0.1, results=()), "oldest step in flight is 0"),
        (StepDone(now=0.0, step=0, duration=0.1, results=()), r"no result for sequences \[1\]"),
        (StepDone(now=0.0, step=0, duration=0.1, results=(SeqResult(1, 2, False),)), "2 tokens"),
    ],
)
def test_events_that_contradict_what_came_before_are_refused(event, why):
    s = scheduler()
    s.on_event(arrive(1))
    s.plan()
    with pytest.raises(ValueError, match=why):
        s.on_event(event)


def test_too_large_requests_name_what_they_need():
    s = Scheduler(make_policy("sarathi"), limits_of(), groups_of((64, None), (2, None)))
    assert s.can_ever_fit(arrive(1, prompt=100, max_new=29)) is None
    assert "3 KV pages" in (s.can_ever_fit(arrive(1, prompt=100, max_new=30)) or "")


def test_planning_further_ahead_than_the_lag_is_refused():
    s = scheduler(lag=1)
    s.on_event(arrive(1))
    s.plan()
    s.plan()
    with pytest.raises(RuntimeError, match=r"steps \[0, 1\]"):
        s.plan()


def test_a_plan_without_work_is_not_answered():
    s = scheduler(lag=0)
    assert not s.plan().has_work
    s.on_event(arrive(1, max_new=1))
    plan = s.plan()
    assert plan.step == 1
    s.on_event(done(plan, SeqResult(1, 1, True)))
    assert not s.has_unfinished


def test_counts_and_time():
    s = scheduler(lag=0, max_num_seqs=1)
    s.on_event(arrive(1, prompt=100))
    s.on_event(arrive(2))
    plan = s.plan()
    assert s.gauges == {
        "num_requests_running": 1,
        "num_requests_waiting": 1,
        "num_programs_pinned": 0,
        "kv_cache_usage_perc": 2 / 64,
        "swap_usage_perc": 0.0,
    }
    s.on_event(done(plan, SeqResult(1, 1, True)))
    assert s.plan().pages.freed == 2
    counters = s.counters
    assert counters["prefill_tokens"] == 110
    assert counters["prefill_padding_tokens"] == 3 * 64 - 110
    s.on_event(Tick(now=7.5))
    s.on_event(CostUpdate(now=8.0, values={"tile_s": 0.1}))
    s.on_event(CostUpdate(now=9.0, values={"row_s": 0.2}))
    assert s.view.now == 9.0
    assert s.view.cost == {"tile_s": 0.1, "row_s": 0.2}


def recorded(policy: str | Chaos = "sarathi") -> Driver:
    driver = Driver(policy, groups=groups_of((12, None), (12, 70)))
    for seq in range(5):
        driver.arrive(seq, 60 + seq, max_new=150)
        driver.step()
    driver.run()
    return driver


@pytest.mark.parametrize("policy", ["sarathi", Chaos(seed=5)])
def test_a_replay_gives_the_same_plans(policy, tmp_path):
    driver = recorded(policy)
    path = tmp_path / "run.rec"
    path.write_bytes(driver.record.getvalue())
    assert list(replay(path)) == driver.plans


def test_a_replay_with_another_policy_is_noticed():
    data = recorded().record.getvalue()
    other = lambda header: Scheduler(make_policy("fcfs"), header.limits, header.groups)  # noqa: E731
    with pytest.raises(ReplayError, match="planned as"):
        list(replay(data, other))


def test_a_record_cut_short_is_good_up_to_its_last_frame():
    driver = recorded()
    data = driver.record.getvalue()
    plans = list(replay(data[: len(data) // 2]))
    assert plans and plans == driver.plans[: len(plans)]


@pytest.mark.parametrize("data", [b"", b"not a record", b"\x01\x00\x00\x00E"])
def test_what_is_no_record_is_refused(data):
    with pytest.raises(ReplayError, match="header"):
        list(replay(data))


def test_the_record_is_written_as_things_happen():
    stream = BytesIO()
    limits: Limits = limits_of()
    s = Scheduler(make_policy("sarathi"), limits, groups_of((64, None)), Recorder(stream))
    header = len(stream.getvalue())
    assert header
    s.on_event(arrive(1))
    assert len(stream.getvalue()) > header
