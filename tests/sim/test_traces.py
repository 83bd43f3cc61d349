"""Readers: what the samples hold, what a file of each format turns into, errors that say what is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from statistics import mean, pstdev

import pytest

from jaxserve.sim import traces
from jaxserve.sim.traces.synthetic import PRESETS
from jaxserve.sim.workload import Trace, page_names


def written(tmp_path: Path, *lines: str) -> Trace:
    path = tmp_path / "trace"
    path.write_text("\n".join(lines) + "\n")
    return traces.load(str(path))


@pytest.mark.parametrize("name", traces.names())
def test_every_trace_of_the_package_can_be_read(name: str):
    trace = traces.load(name)
    assert len(trace.jobs) >= 6
    assert all(turn.prompt >= 1 and turn.output >= 1 and turn.think_s >= 0 for turn in trace.turns)
    assert [job.arrival for job in trace.jobs] == sorted(job.arrival for job in trace.jobs)
    assert trace.jobs[0].arrival == 0.0


def test_azure(tmp_path: Path):
    head = "TIMESTAMP,ContextTokens,GeneratedTokens"
    trace = written(tmp_path, head, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109")
    assert [(job.arrival, job.turns[0].prompt, job.turns[0].output) for job in trace.jobs] == [
        (0.0, 374, 44),
        (pytest.approx(4.314579), 396, 109),
    ]


def test_a_gzipped_file_is_the_same(tmp_path: Path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert traces.load(str(tmp_path / "a.csv.gz")).longest == 418


def test_burstgpt_failures_are_clients_that_go_away(tmp_path: Path):
    trace = written(
        tmp_path,
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,GPT-4,1087,0,1087,API log",
    )
    good, failed = trace.jobs
    assert (good.turns[0].output, good.patience_s) == (18, float("inf"))
    assert failed.patience_s < float("inf") and failed.arrival == 40.0 and failed.tenant == "GPT-4"


def test_mooncake_blocks_are_prefixes(tmp_path: Path):
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 500, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 9]},
    ]
    trace = written(tmp_path, *map(json.dumps, rows))
    assert [job.arrival for job in trace.jobs] == [0.0, 0.5]
    first, second = (page_names(turn, 0, 0, turn.prompt // 64) for turn in trace.turns)
    assert sum(a == b for a, b in zip(first, second, strict=False)) == 1024 // 64


def test_sessions_grow_and_think():
    trace = traces.load("swe-agent")
    assert all(len(job.turns) > 10 for job in trace.jobs)
    turns = list(trace.jobs[0].turns)
    assert turns[0].think_s == 0 and mean(turn.think_s for turn in turns) > 0
    grown = [(a, b) for a, b in zip(turns, turns[1:], strict=False) if b.prompt > a.prompt + a.output]
    assert len(grown) > len(turns) / 2
    for a, b in grown:
        full = a.prompt // 64
        assert page_names(a, 0, 0, full) == page_names(b, 0, 0, full)


def test_taubench_turns_name_their_tools():
    tools = {turn.tool for turn in traces.load("tau-bench").turns}
    assert "get_reservation_details" in tools


def test_lmcache_measures_common_text(tmp_path: Path):
    text = "x" * 4000
    rows = [
        {"timestamp": 1_000_000, "input": text, "output": "y" * 40, "session_id": "s"},
        {"timestamp": 3_000_000, "input": text + "y" * 40 + "z" * 400, "output": "ok", "session_id": "s"},
    ]
    trace = written(tmp_path, *map(json.dumps, rows))
    first, second = trace.turns
    assert (first.prompt, second.prompt) == (1000, 1110)
    assert second.think_s == pytest.approx(2.0 - 10 * 0.02)
    assert page_names(first, 0, 0, 15) == page_names(second, 0, 0, 15)


def test_servegen_follows_its_statistics():
    trace = traces.load("servegen")
    lengths = [turn.prompt for turn in trace.turns]
    # The client's windows have 15 to 50 requests a second; its prompts 172 tokens and more.
    assert min(lengths) >= 172
    assert len(trace.jobs) == pytest.approx(89_920, rel=0.02)


def test_presets_are_what_their_names_say():
    heavy = [turn.output for turn in traces.load("heavy-tail:jobs=4000").turns]
    light = [turn.output for turn in traces.load("light-tail:jobs=4000").turns]
    assert pstdev(heavy) / mean(heavy) > 1.5
    assert pstdev(light) / mean(light) < 0.5
    agents = traces.load("agents")
    assert all(4 <= len(job.turns) <= 12 for job in agents.jobs)
    heads = {page_names(job.turns[0], 0, 0, 1500 // 64) for job in agents.jobs}
    assert len(heads) == PRESETS["agents"][0].groups


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no-such-trace", "azure-conv"),
        ("heavy-tail:jbos=3", "jobs"),
        ("heavy-tail:jobs=many", "jobs=many"),
        ("heavy-tail:prompt=lognormal/3", "lognormal/MEDIAN/SIGMA/CAP"),
    ],
)
def test_what_cannot_be_read_is_explained(spec: str, words: str):
    with pytest.raises(ValueError, match=words):
        traces.load(spec)


def test_files_that_are_no_traces_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="formats: azure"):
        written(tmp_path, "hello")
    with pytest.raises(ValueError, match="not what its first line promises"):
        written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,2")
