"""From a recorded engine to a cost model. What the figures are worth is a benchmark's business (timing); that they come
out at all, for the right steps and from exact inputs, is tested here."""

from __future__ import annotations

import dataclasses
import io
import random
from pathlib import Path

import pytest
from msgspec.structs import replace

from jaxserve.cli import main
from jaxserve.cli.player import TracePlayer
from jaxserve.cli.profile import grid, measure
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.load import load_core
from jaxserve.engine.shapes import EngineShape
from jaxserve.scheduler import make_policy
from jaxserve.sim import traces
from jaxserve.sim.cost import Features, Fitted, terms_of
from jaxserve.sim.machine import published
from jaxserve.sim.metrics import figures
from jaxserve.sim.profile import (
    Timed,
    fit,
    grouped,
    interruptions,
    read_header,
    read_profile,
    timed_steps,
    write_profile,
)
from jaxserve.sim.simulation import Simulation
from jaxserve.sim.workload import Trace, poisson, sample

OPTIONS = {
    "max_num_seqs": 8,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "decode_buckets": [8],
    "tile_buckets": [4],
    "device": "cpu",
}
SHAPE = EngineShape(slots=16, max_len=1024, q=1, decode=(1, 4, 16), tiles=(1, 2, 4))


def steps(draw: random.Random, count: int) -> list[Features]:
    made = []
    for _ in range(count):
        rows, tiles = draw.choice([(1, 0), (4, 0), (16, 0), (4, 1), (4, 2), (16, 4)])
        longest, depth = draw.randint(1, 900), draw.randint(0, 500)
        # One tile of few tokens, the others full.
        last = draw.choice([16, 64])
        ends = [depth + 64] * (tiles - 1) + [depth + last] * (tiles > 0)
        made.append(
            Features(
                bucket=(rows, tiles),
                head=draw.choice([4, 16]) if tiles else rows,
                admits=draw.randint(0, 2) if tiles else 0,
                context=longest * rows // 2,
                longest=longest,
                tile_context=sum(ends),
                tile_longest=max(ends, default=0),
                tile_pairs=sum(end**2 - depth**2 for end in ends),
                since_tiles=0 if tiles else draw.choice([0, 1, 2, 5]),
                rows=draw.randint(rows // 4 + 1, rows),
                tile_tokens=(tiles - 1) * 64 + last if tiles else 0,
                alone=int(tiles > 0 and draw.random() < 0.3),
            )
        )
    return made


def test_a_fit_recovers_the_terms_that_made_the_times():
    draw = random.Random(0)
    truth: dict[str, float] = {}
    made = steps(draw, 400)
    for step in made:
        for name, amount in terms_of(step):
            truth.setdefault(name, draw.uniform(0.5, 2.0) * (1e-3 if amount == 1 else 1e-6))
    cost = Fitted(terms=truth)
    found = Fitted(terms=fit([Timed(step, cost.step_s(step)) for step in made]))
    for step in steps(draw, 50):
        if {name for name, _ in terms_of(step)} <= truth.keys():
            assert found.step_s(step) == pytest.approx(cost.step_s(step), rel=1e-6)


def test_a_fit_survives_steps_that_were_timed_wrongly():
    """An interrupted host sees one step end late and the next one soon after."""
    draw = random.Random(1)
    made = steps(draw, 300)
    truth = {name: 2e-3 if amount == 1 else 1e-6 for step in made for name, amount in terms_of(step)}
    cost = Fitted(terms=truth)
    timed = [Timed(step, cost.step_s(step)) for step in made]
    for i in range(0, 300, 30):
        timed[i], timed[i + 1] = Timed(made[i], timed[i].seconds + 0.05), Timed(made[i + 1], 1e-4)
    found = Fitted(terms=fit(timed))
    for step in made[::7]:
        assert found.step_s(step) == pytest.approx(cost.step_s(step), rel=0.02)


def test_interrupted_steps_do_not_count():
    step = Features((4, 0), 4, 0, 100, 50, 0, 0, 0)
    [group] = grouped([Timed(step, 0.01)] * 9 + [Timed(step, 5.0)])
    assert (group.count, group.seconds) == (9, pytest.approx(0.01))


def test_what_interruptions_cost_comes_to_all_steps_alike():
    """A fit leaves them out, so that they do not bend its shape; who asks for the mean of all steps gets them back."""
    draw = random.Random(3)
    made = steps(draw, 300)
    terms = {name: 2e-3 if amount == 1 else 1e-6 for step in made for name, amount in terms_of(step)}
    seconds = [Fitted(terms=terms).step_s(step) for step in made]
    late = 0.1 * sum(seconds) / 3
    timed = [Timed(step, one + late * (i % 100 == 0)) for i, (step, one) in enumerate(zip(made, seconds, strict=True))]
    assert interruptions(timed, terms) == pytest.approx(1.1)
    assert interruptions([Timed(step, one) for step, one in zip(made, seconds, strict=True)], terms) == pytest.approx(1)


def test_the_grid_tells_what_is_read_from_how_far_it_is_walked():
    """Profiling a simulated engine gives back its prices, also of steps that are not in the grid and although times are
    noisy: with rows that are all alike, what is read in all and the longest walk would be one quantity."""
    truth = {f"forward[{rows},{tiles}]": 1e-3 * (1 + rows / 8 + 4 * tiles) for rows, tiles in SHAPE.forward_buckets()}
    truth |= {f"head[{rows}]": 1e-4 * rows for rows in SHAPE.head_rows}
    truth |= {"walk[1]": 3e-7, "walk[4]": 9e-7, "walk[16]": 4e-6, "context": 2e-7}
    truth |= {"tile context": 7e-6, "tile pairs": 3e-6, "tile walk": 1e-6, "admit": 3e-4}
    truth |= {"after tiles[1]": 7e-4, "after tiles[4]": 5e-4, "after tiles[16]": 2e-4}
    truth |= {"rows": 3e-5, "tile tokens": 1e-5, "alone": 2e-3}
    cost = Fitted(terms=truth)
    limits = replace(published().limits, **SHAPE.bounds)
    machine = dataclasses.replace(published(), shape=SHAPE, limits=limits, cost=cost).with_kv_tokens(40_000)
    timed = []
    for _, jobs in grid(SHAPE, machine.kv_tokens):
        record = io.BytesIO()
        Simulation(Trace("cell", tuple(jobs)), machine, lambda: make_policy("sarathi"), records=[record]).run()
        timed += timed_steps(record.getvalue(), SHAPE, warm_up=0)
    draw = random.Random(2)
    noisy = [Timed(one.step, one.seconds * draw.uniform(0.9, 1.1)) for one in timed]
    found = Fitted(terms=fit(grouped(noisy)))
    for step in steps(draw, 100):
        assert found.step_s(step) == pytest.approx(cost.step_s(step), rel=0.08)


def test_the_grid_reaches_every_bucket():
    names = " ".join(name for name, _ in grid(SHAPE, 100_000))
    for width in SHAPE.decode:
        assert f"{width} rows, context 256" in names
    for tiles in SHAPE.tiles:
        assert f"{tiles} tiles beside 0 rows" in names
    assert not list(grid(SHAPE, 64))


@pytest.fixture(scope="module")
def profile(executables: str, tmp_path_factory: pytest.TempPathFactory):
    config = EngineConfig.of(**OPTIONS, compile_cache=executables)
    made = measure(config, rounds=1, contexts=[64, 256])
    path = tmp_path_factory.mktemp("profile") / "here.json"
    write_profile(made, path)
    return made, path


def test_a_profile_prices_every_step_of_its_engine(profile):
    made, path = profile
    assert read_profile(path) == made
    assert {timed.step.bucket for timed in made.steps} >= {(8, 0), (8, 4)}
    # Cells have texts in common; every prompt is computed nevertheless. A page of a prompt is a tile.
    shape, pools = made.engine_shape, min(c.pages for group in made.groups for c in group.classes)
    plain = [job for _, jobs in grid(shape, pools * 64, [64, 256]) for job in jobs if len(job.turns) == 1]
    least = sum(min(end, job.turns[0].prompt) for job in plain for end in range(64, job.turns[0].prompt + 64, 64))
    assert sum(timed.count * timed.step.tile_context for timed in made.steps) >= least
    assert all(one.measured > 0 and one.predicted > 0 for one in made.residuals())
    machine = made.machine()
    assert machine.kv_tokens == made.groups[0].classes[0].pages * 64
    trace = sample(traces.load("light-tail").shrunk(0.25), 30, 20.0, 0, poisson)
    run = Simulation(trace, machine, lambda: make_policy("sarathi")).run()
    assert figures(run)["finished"] == 30
    rates = machine.cost.parameters()
    assert rates["step_s"] > 0 and all(value >= 0 for value in rates.values())


def test_simulate_takes_the_profile(profile, capsys: pytest.CaptureFixture[str]):
    _, path = profile
    common = ["simulate", "--cost", str(path), "--scale-lengths", "0.1", "--requests", "40", "--seeds", "1"]
    assert main([*common, "--load", "0.5", "--workers", "1"]) == 0
    assert "sarathi" in capsys.readouterr().out
    assert main([*common, "--max-num-seqs", "4"]) == 2
    assert "to `profile`" in capsys.readouterr().err


def test_a_recorded_run_makes_a_profile_and_a_played_trace_is_served_whole(executables: str, tmp_path: Path):
    """Sessions through the engine: lengths as the trace says, turns in order, prefixes found again."""
    record = tmp_path / "steps.rec"
    player = TracePlayer()
    config = EngineConfig.of(**OPTIONS, compile_cache=executables, record=str(record))
    core = load_core(config, player, player.emit, lambda _: None)
    spec = "agents:jobs=6,prompt=uniform/20/100,output=uniform/3/20,turns=uniform/2/3,prefix=130,think_s=0.01"
    trace = sample(traces.load(spec), 6, 100.0, 0, poisson)
    run = player.play(core, trace.jobs)
    core.close()
    assert len(run.served) == trace.requests
    for one in run.served:
        turn = trace.jobs[one.job].turns[one.turn]
        assert (one.prompt, one.output) == (turn.prompt, turn.output)
        assert one.arrival <= one.started <= one.first <= one.finish
    later = [one for one in run.served if one.turn]
    assert all(one.cached >= 128 for one in later)
    made = timed_steps(record.read_bytes(), SHAPE, warm_up=0)
    assert read_header(record.read_bytes()).limits.max_num_seqs == 8
    assert sum(timed.step.admits for timed in made) >= trace.requests
    out = tmp_path / "out.json"
    flags = ["--max-num-seqs", "8", "--max-model-len", "1024", "--max-num-batched-tokens", "256"]
    buckets = ["--decode-buckets", "8", "--tile-buckets", "4", "--device", "cpu"]
    assert main(["profile", "--from-record", str(record), "-o", str(out), *flags, *buckets]) == 0
    assert read_profile(out).steps


def test_records_of_other_engines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "x.rec"
    path.write_bytes(b"nothing")
    assert main(["profile", "--from-record", str(path), "--device", "cpu"]) == 2
    assert "not a record" in capsys.readouterr().err


def test_other_pages_than_those_of_the_simulator_are_refused():
    with pytest.raises(ConfigError, match="--block-size 32: a profile is for the simulator, whose pages have 64"):
        measure(EngineConfig.of(block_size=32))
    machine = published()
    with pytest.raises(ValueError, match="pages of 32 tokens; simulated pages have 64"):
        dataclasses.replace(machine, limits=replace(machine.limits, page_tokens=32))
