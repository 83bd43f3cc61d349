"""Capacity, comparisons at equal arrivals, dispatch, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.cli import main
from jaxserve.sim import traces
from jaxserve.sim.machine import published
from jaxserve.sim.metrics import figures
from jaxserve.sim.report import estimate, number
from jaxserve.sim.sweep import Bar, PolicySpec, Setting, capacity, highest_rate, sweep
from jaxserve.sim.workload import poisson, sample


def setting(spec: str = "light-tail:jobs=200", **changes) -> Setting:
    trace = traces.load(spec)
    return replace(Setting(trace=trace, machine=published(), jobs=120, arrivals="poisson"), **changes)


def test_queues_grow_above_the_capacity_and_not_below():
    here = setting(jobs=300)
    unit = capacity(here)
    light, heavy = (figures(here.run(PolicySpec.parse("sarathi"), share * unit, 0)) for share in (0.6, 1.5))
    assert light["queue_mean_s"] < 0.5
    assert heavy["queue_mean_s"] > 5.0
    assert heavy["jobs_per_s"] == pytest.approx(unit, rel=0.25)


def test_bursts_cost_time_to_first_token_at_the_same_rate():
    """BurstGPT's point: Gamma gaps (CV 2) against Poisson arrivals of equal mean rate."""
    here = setting(jobs=300)
    rate, sarathi = 0.7 * capacity(here), PolicySpec.parse("sarathi")
    smooth, bursty = (
        figures(replace(here, arrivals=how).run(sarathi, rate, 1))["ttft_p99_s"] for how in ("poisson", "gamma/3")
    )
    assert bursty > 1.2 * smooth


def test_sessions_complete_most_when_they_do_not_push_each_other_out():
    """With one client a slot the prefixes of all sessions do not fit; the capacity is that of fewer clients."""
    small = published(max_model_len=4096, max_num_seqs=16, kv_tokens=9_000)
    here = setting("agents:jobs=60,turns=5,prompt=400,output=40,prefix=64", machine=small)
    slots = here.machine.shape.slots
    trace = sample(here.trace, 4 * slots, 1.0, 0, poisson)
    crowded = here.simulation(PolicySpec.parse("sarathi"), trace, clients=slots).run()
    assert capacity(here) > 1.1 * figures(crowded)["jobs_per_s"]


def test_sarathi_holds_the_time_between_tokens_where_prefill_first_does_not():
    """Sarathi-Serve's claim: with a budget, no token waits longer than a step of the budget's size."""
    here = setting("long-prompts:jobs=200")
    rate = 0.8 * capacity(here)
    chunked = figures(here.run(PolicySpec.parse("sarathi:max_num_batched_tokens=512"), rate, 0))
    whole = figures(here.run(PolicySpec.parse("fcfs"), rate, 0))
    assert chunked["tbt_p99_s"] < whole["tbt_p99_s"] / 2


def test_the_highest_rate_that_meets_a_bar_is_found():
    here, sarathi = setting(jobs=200), PolicySpec.parse("sarathi")
    bar = Bar(tbt_p99=1.0, queue_p50=0.5)
    found = highest_rate(here, sarathi, bar, 0, 20.0)
    assert 0 < found < 20
    assert bar.met(figures(here.run(sarathi, found, 0)))
    assert not bar.met(figures(here.run(sarathi, found + 20 / 2**8, 0)))
    assert highest_rate(here, sarathi, Bar(tbt_p99=1e-3), 0, 20.0, steps=3) == 0.0


def test_all_policies_see_the_same_arrivals_and_seeds_differ():
    cells = list(sweep(setting(jobs=40), [PolicySpec.parse("fcfs"), PolicySpec.parse("sarathi")], [0.5, 1.0], 2, 2.0))
    assert [(cell.policy, cell.load) for cell in cells] == [
        ("fcfs", 0.5),
        ("sarathi", 0.5),
        ("fcfs", 1.0),
        ("sarathi", 1.0),
    ]
    fcfs, sarathi = cells[2], cells[3]
    assert [run["new_tokens"] for run in fcfs.runs] == [run["new_tokens"] for run in sarathi.runs]
    assert fcfs.runs[0]["new_tokens"] != fcfs.runs[1]["new_tokens"]
    mean, low, high = fcfs.figures["jct_mean_s"]
    assert low <= mean <= high


def test_processes_change_nothing():
    policies = [PolicySpec.parse("fcfs")]
    alone, spread = (list(sweep(setting(jobs=20), policies, [1.0], 2, 2.0, workers)) for workers in (1, 2))
    assert alone == spread


def test_replicas_share_the_load_and_affinity_finds_prefixes():
    # Prefixes of all groups together are more than one cache holds, but not more than four.
    shared = setting("shared-prefix:jobs=400,groups=60", jobs=400, replicas=4)
    rate = 0.5 * capacity(shared)
    hits = {
        name: figures(replace(shared, dispatch=name).run(PolicySpec.parse("sarathi"), rate, 0))
        for name in ("round-robin", "least-loaded", "prefix-affinity")
    }
    assert hits["prefix-affinity"]["prefix_hit_share"] > 1.3 * hits["round-robin"]["prefix_hit_share"]
    for made in hits.values():
        assert made["finished"] == 400


def test_policy_specifications():
    spec = PolicySpec.parse("sarathi:max_num_batched_tokens=512")
    assert (spec.name, spec.params, spec.options) == ("sarathi", {}, {"max_num_batched_tokens": 512})
    with pytest.raises(ValueError, match="key=value"):
        PolicySpec.parse("sarathi:512")
    with pytest.raises(ValueError, match="argument"):
        PolicySpec.parse("sarathi:budget=512")


@pytest.mark.parametrize(
    ("value", "text"), [(0.001234, "0.00123"), (12.345, "12.3"), (0, "0"), (123456.0, "123,456"), (999.9, "1000")]
)
def test_numbers_have_three_digits(value: float, text: str):
    assert number(value) == text


def test_estimates_show_half_their_interval():
    assert estimate("jct_mean_s", (12.34, 11.0, 14.0)) == "12.3 ±1.5"
    assert estimate("slo_attainment", (0.5, 0.5, 0.5)) == "50.0%"


def test_the_command_writes_table_json_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--requests", "60", "--load", "1.0", "--seeds", "2", "--workers", "1", "--out", str(tmp_path)]
    assert main(["simulate", "--trace", "heavy-tail", *options]) == 0
    text = capsys.readouterr().out
    assert "sarathi" in text and "JCT mean" in text and "±" in text
    result = json.loads((tmp_path / "result.json").read_text())
    assert [cell["policy"] for cell in result["cells"]] == ["fcfs", "sarathi", "mlfq"]
    assert result["cells"][0]["figures"]["finished"]["mean"] == 60
    for plot in ("jct_cdf.png", "load_curve.png", "timeline.png"):
        assert (tmp_path / plot).stat().st_size > 5000


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--trace", "nowhere"], "azure-conv"),
        (["--policy", "best"], "'best'.*sarathi"),
        (["--load", "much"], "--load 'much'"),
        (["--arrivals", "weekly"], "weekly"),
        (["--trace", "arxiv", "--arrivals", "trace"], "no arrival times"),
        (["--dispatch", "random"], "round-robin"),
    ],
)
def test_wrong_options_are_explained(args: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    import re

    assert main(["simulate", *args]) == 2
    assert re.search(words, capsys.readouterr().err)
