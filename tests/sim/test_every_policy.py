"""What must hold under any policy: everybody finishes, nothing is lost, and a recorded run replays byte for byte."""

from __future__ import annotations

from io import BytesIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.scheduler import make_policy, policy_names, replay
from jaxserve.sim import traces
from jaxserve.sim.simulation import Simulated, Simulation
from jaxserve.sim.workload import Job, Trace, Turn, poisson, sample
from tests.sim.machines import machine

POLICIES = [name for name in policy_names() if type(make_policy(name)).__module__.startswith("jaxserve.")]
"""Without those that other tests register."""


def simulate(trace: Trace, policy: str, record: BytesIO | None = None, **options) -> Simulated:
    records = () if record is None else (record,)
    return Simulation(trace, machine(**options), lambda: make_policy(policy), max_tokens=200, records=records).run()


@pytest.mark.parametrize("host_kv_tokens", [0, 64 * 64])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_recorded_run_replays_to_the_same_plans(policy: str, host_kv_tokens: int):
    """Sessions with shared prefixes and tools, and pages for a fraction of them: cache hits, preemptions, aborts."""
    spec = (
        "agents:jobs=12,prompt=uniform/20/150,output=uniform/5/60,turns=uniform/1/4,prefix=130,failures=0.1,think_s=0.1"
    )
    trace = sample(traces.load(spec), 12, 30.0, 1, poisson)
    record = BytesIO()
    run = simulate(trace, policy, record, kv_tokens=20 * 64, host_kv_tokens=host_kv_tokens)
    assert sum(1 for _ in replay(record.getvalue())) >= run.steps > 50
    assert sum(one.cached for one in run.served) > 0


job = st.builds(
    lambda gap, turns, priority, tenant, patience: (gap, turns, priority, tenant, patience),
    st.floats(0, 0.1),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 80)), min_size=1, max_size=3),
    st.integers(0, 2),
    st.sampled_from(["a", "b"]),
    st.sampled_from([float("inf")] * 4 + [0.05]),
)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    each=st.lists(job, min_size=1, max_size=10),
    slots=st.integers(1, 4),
    pages=st.integers(10, 30),
    host=st.sampled_from([0, 5, 50]),
)
def test_every_request_finishes_and_tokens_are_conserved(policy: str, each: list, slots: int, pages: int, host: int):
    now, made = 0.0, []
    for gap, turns, priority, tenant, patience in each:
        now += gap
        made.append(
            Job(
                arrival=now,
                turns=tuple(Turn(prompt, output) for prompt, output in turns),
                priority=priority,
                tenant=tenant,
                patience_s=patience,
            )
        )
    run = simulate(
        Trace("random", tuple(made)), policy, kv_tokens=pages * 64, max_num_seqs=slots, host_kv_tokens=host * 64
    )
    assert run.refused == 0
    assert run.totals["policy_errors"] == 0
    for one in run.served:
        wanted = made[one.job].turns[one.turn].output
        assert one.aborted or one.output == wanted
        assert one.output <= wanted
        assert one.aborted or one.arrival <= one.started < one.first <= one.finish
    begun = {one.job for one in run.served}
    assert begun == set(range(len(made)))
    ended = {one.job for one in run.served if one.last_turn or one.aborted}
    assert ended == begun
    # One gap between tokens for every token after a request's first.
    assert sum(run.gaps.counts) == sum(max(0, one.output - 1) for one in run.served)
