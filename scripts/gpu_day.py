"""Everything that only a GPU can show about the attention kernels, in one command and one report.

    python scripts/gpu_day.py --out gpu-day.md          # on the machine with the GPU
    python scripts/gpu_day.py --parts checks steps --formats bf16 hack4
    python scripts/gpu_day.py --smoke                   # anywhere: tiny shapes, kernels in interpret mode

First the copy bandwidth of the device, against which everything below is read. Then, by the names of `--parts`:

checks   Every kernel, backend and kind of page against the reference on the same pages. A failure is reported and makes
         the exit status 1; what follows still runs.
kernels  Microseconds and GB/s of decode and prefill attention, page-major against layer-major pools.
chunks   Chunks of prompts by backend, cuDNN among them: microseconds of a layer, and whether they agree.
steps    Milliseconds of a whole decode step of an 8B Llama with random weights, by KV format, as engines have it by
         default: one sink page, one residual page.

Timings are medians of several runs, each of many calls inside one program. What does not fit the memory is a dash.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_kernels import (
    FULL,
    KINDS,
    OPS,
    PAGE,
    SMOKE,
    Kind,
    Plan,
    Say,
    bandwidth,
    correctness,
    fill,
    fits,
    kernel_time,
    runs,
    seconds,
    sink,
)

from jaxserve.kv import ABSENT, KVFormat, SealedFormat, allocate, attend_layer, build_meta, formats, kv_shapes
from jaxserve.models.model import Model
from jaxserve.types import KVGroup
from pallas_kernels.chunk_attention import missing

PARTS = ("checks", "kernels", "chunks", "steps")
FORMATS = tuple(name for name in formats.names() if name not in ("f16", "f32"))


def step_format(name: str, plan: Plan) -> KVFormat:
    """As an engine has it by default."""
    format = formats.get(name, backend="reference" if plan.interpret else "triton")
    return (
        dataclasses.replace(format, key_rotation=format.usual_rotation) if isinstance(format, SealedFormat) else format
    )


def step_tables(format: KVFormat, batch: int, pages: int) -> np.ndarray:
    """int32 [classes, batch, pages]: what rows in their last page of `pages` hold of each class, in scattered order."""
    held = format.pages_held(pages)
    tables = np.full((len(held), batch, pages), ABSENT, np.int32)
    index = np.arange(pages)
    kept = (index < format.sink_pages) | (index >= pages - format.residual_pages)
    entries = [np.ones_like(kept)] if len(held) == 1 else [kept, (index >= format.sink_pages) & (index < pages - 1)]
    for table, count, entry in zip(tables, held, entries, strict=True):
        table[:, entry] = np.random.default_rng(0).permutation(batch * count).reshape(batch, count)
    return tables


def step_bytes(format: KVFormat, group: KVGroup, pages: int) -> int:
    """KV that a row in its last page of `pages` reads."""
    first, *others = (kind.bytes for kind in format.kinds(group))
    if not others:
        return pages * first
    plain = min(pages, format.sink_pages + format.residual_pages)
    return plain * first + (pages - plain) * others[0]


def step_time(format: KVFormat, batch: int, context: int, plan: Plan, params: Any, model: Model) -> float | None:
    """Seconds of a decode step of the model: embedding, layers with KV writes, logits, argmax."""
    (group,) = model.kv_groups()
    pages = tuple(batch * held for held in format.pages_held(context // PAGE))
    kinds = format.kinds(group)
    if not fits(sum(count * kind.bytes for count, kind in zip(pages, kinds, strict=True)) + (1 << 30)):
        return None
    kv = allocate(kv_shapes([group], [format], [pages], batch, context))
    kv = dataclasses.replace(kv, tables=(jnp.asarray(step_tables(format, batch, context // PAGE)),))
    slots = jnp.arange(batch, dtype=jnp.int32)
    positions, counts = jnp.full((batch,), context - 1, jnp.int32), jnp.ones((batch,), jnp.int32)
    none = jnp.zeros((0,), jnp.int32)

    def step(params: Any, kv: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        meta = build_meta(kv.tables, slots, positions, counts, none, none, none, rules=[format.rule])

        def attend(layer: int, kv: Any, *qkv: jax.Array) -> tuple[Any, jax.Array]:
            return attend_layer(kv, 0, layer, *qkv, meta, model.attention_spec(layer))

        hidden, kv = model.forward(params, tokens, positions, kv, attend)
        return kv, jnp.argmax(model.logits(params, hidden), axis=-1).astype(jnp.int32)

    jitted = jax.jit(step, donate_argnums=1)
    state = [kv, jnp.zeros((batch,), jnp.int32)]

    def steps() -> jax.Array:
        for _ in range(4):
            state[0], state[1] = jitted(params, state[0], state[1])
        return state[1]

    return seconds(steps, plan) / 4


def chunk(backend: str, tiles: int, context: int, plan: Plan) -> tuple[np.ndarray, float]:
    """What a chunk of `tiles` tiles at the end of a prompt of `context` tokens attends to in a layer of dense KV, and
    the seconds of it, its keys and values written."""
    config, pages = plan.config, context // PAGE
    format = formats.get("bf16", backend=backend)
    group = KVGroup(layers=(0,), kv_heads=config.kv_heads, head_dim=config.head_dim)
    pool = fill(Kind(format.layout), pages, 1, config.kv_heads, config.head_dim)
    table = np.random.default_rng(0).permutation(pages).astype(np.int32)
    state = dataclasses.replace(
        allocate(kv_shapes([group], [format], [(1,)], 1, context)),
        pools=(pool,),
        tables=(jnp.asarray(table.reshape(1, 1, pages)),),
    )
    keys = jax.random.split(jax.random.key(3), 3)
    heads = (config.heads, config.kv_heads, config.kv_heads)
    qkv = [
        jax.random.normal(key, (tiles * PAGE, each, config.head_dim), jnp.bfloat16)
        for key, each in zip(keys, heads, strict=True)
    ]
    none, index = jnp.zeros((0,), jnp.int32), jnp.arange(tiles, dtype=jnp.int32)
    positions, counts = context - (tiles - index) * PAGE, jnp.full((tiles,), PAGE, jnp.int32)
    spec = Model.from_config(config, jnp.bfloat16).attention_spec(0)

    def layer(kv: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
        meta = build_meta(kv.tables, none, none, none, jnp.zeros_like(index), positions, counts)
        return attend_layer(kv, 0, 0, q, k, v, meta, spec)

    jitted = jax.jit(layer, donate_argnums=0)
    held = [state]

    def call() -> jax.Array:
        held[0], out = jitted(held[0], *qkv)
        return out

    return np.asarray(call(), np.float32), seconds(call, plan)


def chunks(plan: Plan, say: Say) -> bool:
    """Times prefill chunks by backend; False if one of them is wrong."""
    say(
        "\n## Chunks of a prompt, dense KV\n\nOne layer, writing included. Difference: to the first backend.\n\n"
        "| backend | tokens | of a prompt of | us | largest difference | |\n|---|---:|---:|---:|---:|---|"
    )
    backends = ["reference"] if plan.interpret else ["triton", "mosaic", *(["cudnn"] if not missing() else [])]
    good = True
    for tiles in plan.tiles:
        for context in sorted({tiles * PAGE, *(c for c in plan.contexts if c > tiles * PAGE)}):
            first: np.ndarray | None = None
            for backend in backends:
                out, took = chunk(backend, tiles, context, plan)
                first = out if first is None else first
                off = float(np.max(np.abs(out - first)))
                good &= off < 3e-2
                verdict = "ok" if off < 3e-2 else "**WRONG**"
                say(f"| {backend} | {tiles * PAGE} | {context} | {took * 1e6:,.1f} | {off:.4f} | {verdict} |")
    return good


def checks(plan: Plan, say: Say) -> bool:
    """False if a kernel is wrong."""
    say(
        "\n## Correctness against the reference\n\n"
        "| op | backend | pages | largest difference | |\n|---|---|---|---:|---|"
    )
    good = True
    for op, backend, name, off, right in correctness(plan):
        good &= right
        say(f"| {op} | {backend} | {name} | {off:.4f} | {'ok' if right else '**WRONG**'} |")
    return good


def kernels(plan: Plan, copy: float, say: Say) -> None:
    """`copy`: bytes per second that a copy moves."""
    config = plan.config
    say(
        f"\n## Kernels\n\n{config.heads} heads over {config.kv_heads} of {config.head_dim}. GB/s: KV bytes of the "
        "call; share: of the copy bandwidth.\n\n"
        "| op | backend | pages | rows | context | page-major us | GB/s | share | "
        "layer-major us |\n|---|---|---|---:|---:|---:|---:|---:|---:|"
    )
    for op, backends in OPS.items():
        for rows in plan.batches if op == "decode" else plan.tiles:
            for context in plan.contexts:
                if op == "prefill" and context < rows * PAGE:
                    continue
                for backend in backends:
                    for name in plan.kinds:
                        if runs(backend, name, plan):
                            say(kernel_row(op, backend, name, rows, context, plan, copy))


def kernel_row(op: str, backend: str, name: str, rows: int, context: int, plan: Plan, copy: float) -> str:
    head = f"| {op} | {backend} | {name} | {rows} | {context} |"
    timed = kernel_time(op, backend, KINDS[name], rows, context, plan, layer_major=False)
    if timed is None:
        return f"{head} - | | | |"
    took, size = timed
    other = kernel_time(op, backend, KINDS[name], rows, context, plan, layer_major=True)
    rate = size / took
    layer_major = "-" if other is None else f"{other[0] * 1e6:,.1f}"
    return f"{head} {took * 1e6:,.1f} | {rate / 1e9:,.0f} | {rate / copy:.0%} | {layer_major} |"


def steps(plan: Plan, names: Sequence[str], copy: float, say: Say) -> None:
    say(
        "\n## 8B decode steps\n\nMilliseconds; the share is the least time for weights and KV at the copy "
        "bandwidth over the measured time.\n\n| pages | batch | context | ms | share |\n|---|---:|---:|---:|---:|"
    )
    model = Model.from_config(plan.config, jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0))
    read = params | {"embedding": {"head": params["embedding"]["head"]}}  # of the table, a few rows
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(read))
    (group,) = model.kv_groups()
    for name in names:
        format = step_format(name, plan)
        for batch in plan.batches:
            for context in plan.contexts:
                took = step_time(format, batch, context, plan, params, model)
                if took is None:
                    say(f"| {name} | {batch} | {context} | - | |")
                    continue
                least = (weights + batch * step_bytes(format, group, context // PAGE)) / copy
                say(f"| {name} | {batch} | {context} | {took * 1e3:.2f} | {least / took:.0%} |")


def report(plan: Plan, parts: Sequence[str], names: Sequence[str], say: Say) -> bool:
    """`names`: formats of the steps. False if a kernel was wrong."""
    say(f"# GPU day: {jax.devices()[0].device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}\n")
    copy = bandwidth(plan)
    say(f"Copy bandwidth: {copy / 1e9:,.0f} GB/s (reads and writes, {plan.copy_bytes >> 20} MiB).")
    good = True
    for part in parts:
        match part:
            case "checks":
                good &= checks(plan, say)
            case "kernels":
                kernels(plan, copy, say)
            case "chunks":
                good &= chunks(plan, say)
            case "steps":
                steps(plan, names, copy, say)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, interpret mode: checks this script, times nothing"
    )
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    parser.add_argument("--pages", nargs="+", choices=tuple(KINDS), help="of checks and kernels; default: all")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="of steps; default: all")
    args = parser.parse_args()
    say = sink(args.smoke, args.out)
    if say is None:
        return 2
    plan = SMOKE if args.smoke else FULL
    plan = dataclasses.replace(plan, kinds=tuple(args.pages or plan.kinds))
    return 0 if report(plan, args.parts, args.formats, say) else 1


if __name__ == "__main__":
    sys.exit(main())
