"""`jaxserve profile`: measures steps of the real engine over a grid of shapes and fits the simulator's cost model."""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import platform
import random
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
from jaxserve.sim.workload import Job, Turn, session_spans
from jaxserve.types import PAGE_TOKENS, Control

DECODE_STEPS = 24
LONG_ANSWER = 150
"""Tokens of answers that nothing interrupts: most steps of the other cells come soon after tiles, which costs."""
PROBES = 8
PAUSES_S = (0.005, 0.02, 0.08)
"""Between two prompts of a session. The work of taking one in is not to fall into the step that shows what tiles leave
behind; and a machine that has rested longer may be slower at first."""
SHORT_TILE = 16
"""Tokens of tiles that are mostly padding: whether that costs anything where much is read."""
CLIENT_TURNS = 4
CLIENT_OUTPUT = (8, 40)
LONGEST_CLIENT = 4096
"""Tokens: of longer texts the grid of contexts knows enough."""


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
    group.add_argument("--rounds", type=int, default=5, metavar="N", help="How often the grid is run. Default: 5.")
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
    rounds: int = 5,
    contexts: Sequence[int] = (),
    say: Callable[[str], None] = lambda _: None,
    clock: str = "wall",
) -> Profile:
    """Profiles an engine in this process. All its programs are compiled first. `clock`: one of player.CLOCKS."""
    if config.cache.block_size != PAGE_TOKENS:
        raise ConfigError(
            f"--block-size {config.cache.block_size}: a profile is for the simulator, whose pages have {PAGE_TOKENS} "
            "tokens"
        )
    from jaxserve.cli.metronome import Metronome, SmallEngine
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
        small = SmallEngine(config)
        metronome = Metronome(core, player.clock, small)
        kv_tokens = min(core.ready.num_pages) * PAGE_TOKENS
        cells = [cell for _ in range(rounds) for cell in grid(shape, kv_tokens, contexts)]
        for number, (name, jobs) in enumerate(cells, 1):
            say(f"{number} of {len(cells)}: {name}")
            # Cells have texts in common, and all prompts must be computed.
            player.put(Control(verb="reset_prefix_cache"))
            player.play(metronome, jobs)
        core.close()
        small.close()
        return _profile(config, record.read_bytes(), metronome.pace, metronome.beat_s())


def grid(shape: EngineShape, kv_tokens: int, contexts: Sequence[int] = ()) -> Iterator[tuple[str, list[Job]]]:
    """What to run. Every decode width, full and almost empty, at every context that fits, with all rows alike and with
    one long one: what is read in all and the longest walk must differ somewhere, or no fit can tell what each costs.
    Every tile bucket beside no, few and many rows, deeper and deeper into a prompt, and with few tokens in each tile,
    or a tile and a token in it always come together. Then service: clients of all lengths that come and go."""
    lengths = contexts or [n for n in (64, 256, 1024, 4096, 16384) if n < shape.max_len]
    widths = sorted({1, *shape.decode, *(width + 1 for width in shape.decode[:-1])})
    for context in lengths:
        for width in widths:
            # While the prompts are computed, a few tiles a step, those that are done go on decoding.
            steps = DECODE_STEPS + -(-width * -(-context // PAGE_TOKENS) // shape.tiles[-1])
            if context + steps <= shape.max_len and width * (context + steps + PAGE_TOKENS) <= kv_tokens:
                yield f"{width} rows, context {context}", [_job(context, steps)] * width
                if width > 1 and context > PAGE_TOKENS:
                    short = [_job(PAGE_TOKENS // 2, steps)] * (width - 1)
                    yield f"{width} rows, one of them at context {context}", [_job(context, steps), *short]
    small, most_rows = shape.mixed_decode[0], shape.slots - 1
    for tiles in shape.tiles:
        # With `small` rows the forward is of the smaller width and the head, which has a row more, of the next one.
        for rows in sorted({0, 1, min(small, most_rows), min(small + 1, most_rows)}):
            prompts = _depths(tiles, min(shape.max_len - 1, kv_tokens // 2 - rows * 2 * PAGE_TOKENS))
            decoders = [_job(PAGE_TOKENS // 2, 6 * PROBES)] * rows
            if rows < shape.slots and prompts:
                session = _session(prompts, [1] * len(prompts), 0, PAUSES_S[: 1 if rows else None])
                yield f"{tiles} tiles beside {rows} rows", [*decoders, session]
    for width in shape.decode:
        if PAGE_TOKENS + LONG_ANSWER <= shape.max_len and width * (2 * PAGE_TOKENS + LONG_ANSWER) <= kv_tokens:
            yield f"{width} rows, long answers", [_job(PAGE_TOKENS // 2, LONG_ANSWER)] * width
    for tiles in shape.tiles:
        fits = min(shape.max_len, kv_tokens // (2 * tiles)) // 2 // PAGE_TOKENS * PAGE_TOKENS
        prompts = [fits + turn * SHORT_TILE for turn in range(PROBES)]
        if fits and tiles < shape.slots and prompts[-1] < shape.max_len:
            sessions = [_session(prompts, [1] * PROBES, client, PAUSES_S[:1]) for client in range(tiles)]
            yield f"{tiles} sessions with {SHORT_TILE} tokens more each", sessions
    most = min(shape.max_len, kv_tokens // 2) // PAGE_TOKENS
    edges = range(most // 2 * PAGE_TOKENS, most * PAGE_TOKENS, PAGE_TOKENS)[:PROBES]
    prompts = [edge + side for edge in edges if edge for side in (-SHORT_TILE, SHORT_TILE)]
    if prompts:
        yield "tiles of few tokens on both sides of a page's end", [_session(prompts, [1] * len(prompts), 0)]
    ends = _depths(shape.tiles[-1], min(shape.max_len - SHORT_TILE - 1, kv_tokens // 2))
    if ends:
        turns = tuple(Turn(length + SHORT_TILE, 1) for length in ends)
        yield f"prompts that end with a tile of {SHORT_TILE} tokens", [Job(arrival=0.0, turns=turns)]
    for width in shape.decode:
        longest = min(shape.max_len, kv_tokens // width - PAGE_TOKENS, LONGEST_CLIENT)
        if longest > 2 * PAGE_TOKENS:
            yield f"{width} clients", list(clients(width, longest))


def _depths(tiles: int, most: int) -> list[int]:
    """Lengths of a session's prompts, each `tiles` longer than the one before, as far as they fit."""
    step = min(tiles * PAGE_TOKENS, most)
    return [*range(step, most + 1, step)][:PROBES] if most >= PAGE_TOKENS else []


def clients(count: int, longest: int) -> Iterator[Job]:
    """Each sends a request when the one before is answered. Half of them send another text every time, from a few
    tokens to `longest`; the others go on with their conversation."""
    draw = random.Random(count)
    for client in range(count):
        outputs = [draw.randint(*CLIENT_OUTPUT) for _ in range(CLIENT_TURNS)]
        room = longest - max(outputs)
        if client % 2:
            said, prompts = 0, []
            for output in outputs:
                prompts.append(min(said + draw.randint(8, longest // (2 * CLIENT_TURNS)), room))
                said = prompts[-1] + output
            yield _session(prompts, outputs, client)
        else:
            prompts = [min(room, round(8 * (longest / 8) ** draw.random())) for _ in outputs]
            turns = tuple(Turn(prompt, output) for prompt, output in zip(prompts, outputs, strict=True))
            yield Job(arrival=0.0, turns=turns)


def _session(prompts: Sequence[int], outputs: Sequence[int], number: int, pauses_s: Sequence[float] = (0.0,)) -> Job:
    """Turns that begin with all that was said before, in the session of that number, after these pauses in turn."""
    shared = [0, *(prompt + output for prompt, output in zip(prompts, outputs, strict=True))]
    spans = session_spans(prompts, shared, itertools.count(number * len(prompts)))
    said = zip(prompts, outputs, spans, itertools.cycle(pauses_s), strict=False)
    return Job(arrival=0.0, turns=tuple(Turn(*turn) for turn in said))


def _job(prompt: int, output: int) -> Job:
    return Job(arrival=0.0, turns=(Turn(prompt, output),))


def _profile(
    config: EngineConfig, record: bytes, pace: Callable[[int], float] = lambda step: 1.0, beat_s: float = 0.0
) -> Profile:
    """
    Raises:
        ValueError: this is no record, or one of an engine with other options.
    """
    limits = read_header(record).limits
    shape = _shape(config, limits.max_model_len)
    if msgspec.structs.replace(limits, **shape.bounds) != limits:
        raise ValueError(f"the engine ran with other options: its limits were {limits}")
    return make_profile(record, shape, _about(config), pace=pace, beat_s=beat_s)


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
