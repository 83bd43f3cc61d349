"""`jaxserve profile`: measures steps of the real engine over a grid of shapes and fits the simulator's cost model."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from jaxserve.cli.parser import Parser, add_engine_options, engine_config
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.shapes import EngineShape
from jaxserve.sim.profile import Profile, make_profile, read_header, write_profile
from jaxserve.sim.report import aligned
from jaxserve.sim.workload import Job, Turn
from jaxserve.types import PAGE_TOKENS

DECODE_STEPS = 24
PROBES = 8


def parser() -> Parser:
    made = Parser(
        "profile",
        """
        Runs the engine over a grid of decode widths, prompt tiles and context lengths, times every step, and fits what
        `jaxserve simulate --cost FILE` needs to predict this machine. Takes a few minutes at most; measure on a
        machine that does nothing else. The profile holds for the engine options it was taken with.
        """,
        """
        jaxserve profile -o here.json
        jaxserve profile -o qwen.json --model ~/models/Qwen3-0.6B --max-num-seqs 64
        jaxserve profile -o production.json --from-record steps.rec      # of an engine that ran with --record steps.rec
        """,
    )
    group = made.add_argument_group("profile")
    group.add_argument(
        "-o", "--output", type=Path, default=Path("profile.json"), metavar="FILE", help="Default: profile.json."
    )
    group.add_argument("--rounds", type=int, default=2, metavar="N", help="How often the grid is run. Default: 2.")
    group.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        metavar="N",
        help="Context lengths of decode rows. Default: 64, 256, 1024, ... as far as model and KV cache allow.",
    )
    group.add_argument(
        "--from-record",
        type=Path,
        metavar="FILE",
        help="Do not run anything: fit the steps of a run that was recorded with --record and the same options.",
    )
    add_engine_options(made)
    return made


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds} must be at least 1")
    config = engine_config(args)
    started = time.perf_counter()
    if args.from_record is not None:
        profile = _from_record(config, args.from_record)
    else:
        profile = measure(config, args.rounds, args.contexts or (), _say)
    write_profile(profile, args.output)
    print(residual_table(profile))
    print(f"{args.output}: {len(profile.steps)} kinds of steps, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _from_record(config: EngineConfig, path: Path) -> Profile:
    try:
        return _profile(config, path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--from-record {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--from-record {path}: {error}") from None


def measure(
    config: EngineConfig,
    rounds: int = 2,
    contexts: Sequence[int] = (),
    say: Callable[[str], None] = lambda _: None,
    clock: str = "wall",
) -> Profile:
    """Profiles an engine in this process. All its programs are compiled first. `clock`: one of player.CLOCKS."""
    from jaxserve.cli.player import CLOCKS, TracePlayer
    from jaxserve.engine.load import load_core

    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        player = TracePlayer(CLOCKS[clock]())
        runtime = replace(config.runtime, record=str(record), wait_for_buckets=True)
        core = load_core(replace(config, runtime=runtime), player, player.emit, say, player.clock)
        gc.collect()
        gc.freeze()  # as the engine's own process does
        shape = _shape(config, core.ready.limits.max_model_len)
        kv_tokens = min(core.ready.num_pages) * PAGE_TOKENS
        cells = [cell for _ in range(rounds) for cell in grid(shape, kv_tokens, contexts)]
        for number, (name, jobs) in enumerate(cells, 1):
            say(f"{number} of {len(cells)}: {name}")
            player.play(core, jobs)
        core.close()
        return _profile(config, record.read_bytes())


def grid(shape: EngineShape, kv_tokens: int, contexts: Sequence[int] = ()) -> Iterator[tuple[str, list[Job]]]:
    """What to run: every decode width at every context that fits; every tile bucket beside no, few and many rows."""
    lengths = contexts or [n for n in (64, 256, 1024, 4096, 16384) if n < shape.max_len]
    for context in lengths:
        for width in shape.decode:
            # While the prompts are computed, a few tiles a step, those that are done go on decoding.
            steps = DECODE_STEPS + -(-width * -(-context // PAGE_TOKENS) // shape.tiles[-1])
            if context + steps <= shape.max_len and width * (context + steps + PAGE_TOKENS) <= kv_tokens:
                yield f"{width} rows, context {context}", [_job(context, steps)] * width
    few, many = 1, min(shape.mixed_decode[0] + 1, shape.slots - 1)
    for tiles in shape.tiles:
        prompt = min(tiles * PAGE_TOKENS, shape.max_len - 1)
        for rows in (0, few, many):
            probes = Job(arrival=0.0, turns=(Turn(prompt, 1),) * PROBES)
            decoders = [_job(PAGE_TOKENS // 2, 6 * PROBES)] * rows
            if rows < shape.slots and rows * 2 * PAGE_TOKENS + prompt < kv_tokens:
                yield f"{tiles} tiles beside {rows} rows", [*decoders, probes]


def _job(prompt: int, output: int) -> Job:
    return Job(arrival=0.0, turns=(Turn(prompt, output),))


def _profile(config: EngineConfig, record: bytes) -> Profile:
    """
    Raises:
        ValueError: this is no record, or one of an engine with other options.
    """
    limits = read_header(record).limits
    shape = _shape(config, limits.max_model_len)
    if msgspec.structs.replace(limits, **shape.bounds) != limits:
        raise ValueError(f"the engine ran with other options: its limits were {limits}")
    return make_profile(record, shape, _about(config))


def _shape(config: EngineConfig, max_len: int) -> EngineShape:
    import jax

    return EngineShape.of(config, max_len, on_gpu=jax.devices()[0].platform == "gpu")


def _about(config: EngineConfig) -> dict[str, str]:
    import jax

    return {
        "model": config.model.model or "bundled model",
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def residual_table(profile: Profile) -> str:
    """Measured and predicted step times by bucket."""
    rows = [["rows, tiles", "steps", "measured ms", "predicted ms", "error"]]
    for one in profile.residuals():
        rows.append(
            [
                f"{one.bucket[0]}, {one.bucket[1]}",
                f"{one.count}",
                f"{1e3 * one.measured:.2f}",
                f"{1e3 * one.predicted:.2f}",
                f"{100 * one.error:.0f}%",
            ]
        )
    return aligned(rows)
