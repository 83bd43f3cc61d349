"""mlfq by the engine's own pace: what it decides does not depend on the unit of time."""

from __future__ import annotations

import dataclasses
import io
from functools import partial

from msgspec import structs

from jaxserve.scheduler import make_policy, replay
from jaxserve.sim import traces
from jaxserve.sim.cost import Published
from jaxserve.sim.machine import published
from jaxserve.sim.simulation import Simulated, Simulation
from jaxserve.sim.workload import Trace, poisson, sample
from jaxserve.types import Plan

RATE = 4.0
"""Jobs a second: more than the published machine completes."""


def run(faster: float, **params: float) -> tuple[Simulated, list[Plan]]:
    """A heavy tail on a machine so many times as fast as the published one, arriving as much faster."""
    cost = Published()
    terms = {name: getattr(cost, name) / faster for name in cost.__struct_fields__ if name != "name"}
    machine = dataclasses.replace(published(max_num_seqs=4), cost=structs.replace(cost, **terms))
    trace = sample(traces.load("heavy-tail").shrunk(0.5), 150, RATE, 0, poisson)
    arrivals = Trace("faster", tuple(structs.replace(job, arrival=job.arrival / faster) for job in trace.jobs))
    record = io.BytesIO()
    done = Simulation(arrivals, machine, partial(make_policy, "mlfq", **params), records=[record]).run()
    return done, list(replay(record.getvalue()))


def test_a_faster_engine_makes_the_same_plans():
    slow, plans = run(1.0)
    fast, same = run(16.0)  # a power of two: every float comes out as a sixteenth
    assert sum(one.preemptions for one in slow.served) > 20
    assert fast.steps == slow.steps and same == plans


def test_seconds_can_be_said():
    _, plans = run(16.0)
    assert run(16.0, first_quantum_s=1.0)[1] != plans
    assert run(16.0, check_every=50, starve_s=0.1)[1] != run(16.0, check_every=50)[1]
