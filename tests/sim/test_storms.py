"""Where memory is what is short, a policy that displaces must not spend the machine on computing again or on copies."""

from __future__ import annotations

from functools import cache

import pytest

from jaxserve.sim import traces
from jaxserve.sim.machine import PUBLISHED_BYTES_PER_TOKEN, published
from jaxserve.sim.metrics import figures
from jaxserve.sim.sweep import PolicySpec, Setting
from jaxserve.sim.workload import Trace, poisson, sample

JOBS = 400


@cache
def saturated() -> tuple[Setting, Trace]:
    """Conversations at one and a half times what the machine can do; its memory holds a third of its slots."""
    trace = traces.load("azure-conv").shrunk(0.25)
    machine = published(max_model_len=2048, max_num_seqs=64, max_num_batched_tokens=512, kv_tokens=8_000)
    setting = Setting(trace=trace, machine=machine, jobs=JOBS, arrivals="poisson", max_tokens=500)
    return setting, sample(trace, JOBS, 16.0, 0, poisson)


@cache
def played(policy: str) -> dict[str, float]:
    setting, arrivals = saturated()
    return figures(setting.simulation(PolicySpec.parse(policy), arrivals).run())


@pytest.mark.parametrize("policy", ["mlfq", "auto", "urgency"])
def test_little_is_computed_again(policy: str):
    run, plain = played(policy), played("sarathi")
    assert run["finished"] == JOBS
    assert run["recomputed_tokens"] < 0.2 * run["prompt_tokens"]
    assert run["seconds"] < 1.15 * plain["seconds"]


def test_what_bounds_it_is_the_memory_that_started_jobs_may_fill():
    bounded, unbounded = played("mlfq"), played("mlfq:full=1e9")
    assert unbounded["preemptions"] > 10 * max(10, bounded["preemptions"])
    assert unbounded["jct_mean_s"] > 1.5 * bounded["jct_mean_s"]


@pytest.mark.parametrize("policy", ["mlfq", "urgency"])
@pytest.mark.parametrize("link", [8.0, 192.0])
def test_a_link_carries_each_page_a_few_times_at_most(policy: str, link: float):
    run = played(f"{policy}:host_kv_tokens=32000:host_link_gbps={link}")
    kv_bytes = (run["prompt_tokens"] + run["new_tokens"]) * PUBLISHED_BYTES_PER_TOKEN
    assert run["finished"] == JOBS
    assert run["swap_out_bytes"] + run["swap_in_bytes"] < 3 * kv_bytes
    assert run["recomputed_tokens"] < 0.3 * run["prompt_tokens"]
    assert run["seconds"] < 1.25 * played("sarathi")["seconds"]


def test_mlfq_starts_nothing_for_a_host_that_is_slower_than_computing():
    assert played("mlfq:host_kv_tokens=32000:host_link_gbps=8.0") == played("mlfq:host_link_gbps=8.0")
