"""Times the launch sizes that pallas_kernels/tuning.py could choose, and says where it should choose otherwise.

    python scripts/tune_kernels.py --out tuning.md      # on the machine with the GPU; an hour for all pages
    python scripts/tune_kernels.py --pages bf16 hack4
    python scripts/tune_kernels.py --smoke              # anywhere: tiny shapes, kernels in interpret mode

For each kernel, kind of page and shape: the sizes of today, then shares of a row's pages (decode) or queries of a
program (prefill), then warps and stages at the best of those. What does not compile is passed over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from gpu_kernels import FULL, KINDS, PAGE, SMOKE, Kind, Plan, Say, fill, kernel_time, sink
from jax.experimental import pallas as pl

from pallas_kernels.tuning import Launch, decode_launch, decode_splits, prefill_launch

SHAPES = {"decode": ((1, 1024), (1, 16384), (16, 4096), (64, 1024), (64, 4096)), "prefill": ((8, 1024), (8, 16384))}
"""Rows or tiles, and tokens of context."""
SMOKE_SHAPES = {"decode": ((2, 256),), "prefill": ((1, 256),)}
WARPS, STAGES = (4, 8), (1, 2, 3)


def today(op: str, kind: Kind, rows: int, context: int, plan: Plan) -> dict[str, Any]:
    """What tuning.py chooses."""
    config = plan.config
    if op == "decode":
        vectors = max(16, pl.next_power_of_2(config.heads // config.kv_heads))
        splits = min(decode_splits(rows, config.kv_heads), context // PAGE)
        return {"splits": splits, "launch": decode_launch(vectors)}
    layout, pool = kind.layout, jax.eval_shape(lambda: fill(kind, 1, 1, config.kv_heads, config.head_dim))
    q = jax.ShapeDtypeStruct((1,), "bfloat16")
    return {"launch": prefill_launch(PAGE, config.head_dim, layout.dot_dtype(pool, q), layout.arrays(pool))}


def wider(op: str, now: dict[str, Any], pages: int) -> Iterator[dict[str, Any]]:
    """Other shares of the pages, or other blocks of queries."""
    if op == "decode":
        yield from (now | {"splits": splits} for splits in (1, 2, 4, 8, 16) if splits <= pages)
    else:
        yield from (now | {"launch": now["launch"]._replace(block=block)} for block in (16, 32, 64))


def deeper(now: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Other warps and stages."""
    for warps in WARPS:
        yield from (now | {"launch": Launch(now["launch"].block, warps, stages)} for stages in STAGES)


def tuned(op: str, name: str, rows: int, context: int, plan: Plan) -> str | None:
    """A row of the table; None where not even today's sizes run."""
    kind = KINDS[name]
    times: dict[tuple[Any, ...], float] = {}

    def took(sizes: dict[str, Any]) -> float:
        key = tuple(sizes.values())
        if key not in times:
            try:
                timed = kernel_time(op, "triton", kind, rows, context, plan, layer_major=False, **sizes)
            except Exception as error:  # of the compiler, the driver or the allocator: each has types of its own
                print(f"{op} {name} {sizes}: {type(error).__name__}", file=sys.stderr)
                timed = None
            times[key] = float("inf") if timed is None else timed[0]
        return times[key]

    now = today(op, kind, rows, context, plan)
    before = took(now)
    if before == float("inf"):
        return None
    best = min([now, *wider(op, now, context // PAGE)], key=took)
    best = min([best, *deeper(best)], key=took)
    return (
        f"| {op} | {name} | {rows} | {context} | {text(now)} | {before * 1e6:,.1f} | {text(best)} | "
        f"{took(best) * 1e6:,.1f} | {before / took(best):.2f} |"
    )


def text(sizes: dict[str, Any]) -> str:
    launch = sizes["launch"]
    width = f"{sizes['splits']} shares" if "splits" in sizes else f"{launch.block} queries"
    return f"{width}, {launch.num_warps} warps, {launch.num_stages} stages"


def report(plan: Plan, names: tuple[str, ...], shapes: dict[str, Any], say: Say) -> None:
    say(f"# Launch sizes: {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    say("| op | pages | rows | context | today | us | best | us | times |\n|---|---|---:|---:|---|---:|---|---:|---:|")
    for op, cases in shapes.items():
        for name in names:
            for rows, context in cases:
                row = tuned(op, name, rows, context, plan)
                say(row or f"| {op} | {name} | {rows} | {context} | - | | | | |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", nargs="+", choices=tuple(KINDS), help="default: all")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, interpret mode: checks this script only")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    say = sink(args.smoke, args.out)
    if say is None:
        return 2
    plan = SMOKE if args.smoke else FULL
    report(plan, tuple(args.pages or plan.kinds), SMOKE_SHAPES if args.smoke else SHAPES, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
