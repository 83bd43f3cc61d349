"""Everything that only a GPU can show about the attention kernels, in one command and one report.

    python scripts/gpu_day.py --out gpu-day.md          # on the machine with the GPU
    python scripts/gpu_day.py --smoke                   # anywhere: tiny shapes, kernels in interpret mode

1. Copy bandwidth of the device, against which everything below is read.
2. Correctness: every kernel, backend and page layout against the reference on the same pages. A failure is reported and
   makes the exit status 1; what follows still runs.
3. Kernels: microseconds and GB/s of decode and prefill attention, page-major against layer-major pools.
4. Chunks of prompts by backend, cuDNN among them: microseconds of a layer, and whether they agree.
5. Steps: milliseconds of a whole decode step of an 8B Llama with random weights, by KV format, as engines have it by
   default: one sink page, one residual page.

Timings are medians of several runs, each of many calls inside one program. What does not fit the memory is a dash.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.aot.steps import LLAMA_8B
from jaxserve.kv import ABSENT, KVFormat, SealedFormat, allocate, attend_layer, build_meta, formats, kv_shapes
from jaxserve.models.config import DecoderConfig
from jaxserve.models.model import Model
from jaxserve.types import KVGroup
from pallas_kernels.chunk_attention import missing
from pallas_kernels.layouts import Dense, EightBitRows, Fp8, Int8, Kivi, hack
from pallas_kernels.merge import Attended, normalize
from pallas_kernels.paged_decode import mosaic as decode_mosaic
from pallas_kernels.paged_decode import reference as decode_reference
from pallas_kernels.paged_decode import triton as decode_triton
from pallas_kernels.paged_prefill import mosaic as prefill_mosaic
from pallas_kernels.paged_prefill import reference as prefill_reference
from pallas_kernels.paged_prefill import triton as prefill_triton

PAGE = 64
DISTINCT = 17
LAYOUTS: dict[str, Any] = {
    "bf16": Dense(jnp.bfloat16),
    "int8": EightBitRows(Int8()),
    "fp8": EightBitRows(Fp8()),
    "kivi4": Kivi(4),
    "kivi2": Kivi(2),
    "hack8": hack(8),
    "hack4": hack(4),
    "hack2": hack(2),
}
OPS: dict[str, dict[str, Callable[..., Attended]]] = {
    "decode": {"triton": decode_triton.paged_decode, "mosaic": decode_mosaic.paged_decode},
    "prefill": {"triton": prefill_triton.paged_prefill, "mosaic": prefill_mosaic.paged_prefill},
}
REFERENCES = {"decode": decode_reference.paged_decode, "prefill": prefill_reference.paged_prefill}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    config: DecoderConfig
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    tiles: tuple[int, ...]
    layers: int
    """Of the pools of the kernel timings."""
    copy_bytes: int
    repeats: int
    interpret: bool
    layouts: tuple[str, ...]


FULL = Plan(
    config=LLAMA_8B,
    batches=(1, 16, 64, 256),
    contexts=(1024, 4096, 16384, 65536),
    tiles=(8, 32),
    layers=8,
    copy_bytes=4 << 30,
    repeats=7,
    interpret=False,
    layouts=tuple(LAYOUTS),
)
SMOKE = Plan(
    config=dataclasses.replace(
        LLAMA_8B,
        vocab_size=256,
        hidden=128,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=64,
        intermediate=256,
        max_position=512,
        windows=(None, None),
    ),
    batches=(2,),
    contexts=(256,),
    tiles=(1,),
    layers=2,
    copy_bytes=1 << 20,
    repeats=1,
    interpret=True,
    layouts=("bf16", "int8", "hack2"),
)


@dataclasses.dataclass(frozen=True)
class Pages:
    """A pool and rows that share none of its pages, in scattered order."""

    pool: Any
    tables: jax.Array
    bytes: int


def fill(layout: Any, pages: int, layers: int, kv_heads: int, head_dim: int) -> Any:
    """A pool of `layout` with random keys and values: DISTINCT different pages, repeated over pages and layers."""
    k, v = jax.random.normal(jax.random.key(0), (2, DISTINCT, kv_heads, PAGE, head_dim), jnp.bfloat16)
    if hasattr(layout, "put_pages"):
        shapes = layout.pool(DISTINCT, 1, kv_heads, PAGE, head_dim)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        some = layout.put_pages(empty, 0, k, v, jnp.arange(DISTINCT), jnp.ones((DISTINCT, PAGE), bool))
    else:
        some = {name: array[:, None] for name, array in layout.encode(k, v).items()}
    which = (jnp.arange(pages)[:, None] + 5 * jnp.arange(layers)) % DISTINCT
    return jax.jit(lambda some: jax.tree.map(lambda x: x[which, 0], some))(some)


def page_bytes(layout: Any, kv_heads: int, head_dim: int) -> int:
    """Of one layer of a page."""
    one = jax.eval_shape(lambda: fill(layout, 1, 1, kv_heads, head_dim))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))


def pages_for(layout: Any, rows: int, context: int, layers: int, plan: Plan) -> Pages:
    per_row = context // PAGE
    config = plan.config
    pool = fill(layout, rows * per_row, layers, config.kv_heads, config.head_dim)
    ids = np.random.default_rng(0).permutation(rows * per_row).astype(np.int32)
    size = rows * per_row * page_bytes(layout, config.kv_heads, config.head_dim)
    return Pages(pool, jnp.asarray(ids.reshape(rows, per_row)), size)


def fits(bytes_needed: int) -> bool:
    """Whether that much more fits into the device, with a tenth to spare."""
    stats = jax.devices()[0].memory_stats() or {}
    return bytes_needed < 0.9 * (stats.get("bytes_limit", 4 << 30) - stats.get("bytes_in_use", 0))


def seconds(call: Callable[[], Any], plan: Plan) -> float:
    """Median time of `call`, after one call that compiles and one that warms up."""
    for _ in range(2):
        jax.block_until_ready(call())
    times = []
    for _ in range(plan.repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bandwidth(plan: Plan) -> float:
    """Bytes per second that a copy reads and writes."""
    x = jnp.zeros(plan.copy_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * plan.copy_bytes / seconds(lambda: add(x), plan)


def options(plan: Plan, backend: str) -> dict[str, Any]:
    return {"interpret": True} if plan.interpret and backend == "triton" else {}


def queries(op: str, rows: int, plan: Plan) -> jax.Array:
    shape = (rows, 1 if op == "decode" else PAGE, plan.config.heads, plan.config.head_dim)
    return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)


def correctness(plan: Plan) -> Iterator[tuple[str, str, str, float, bool]]:
    """(op, backend, layout, largest difference to the reference, whether that is within rounding)."""
    context = 4 * PAGE
    for op, backends in OPS.items():
        for backend, kernel in backends.items():
            for name in plan.layouts:
                if backend == "mosaic" and (plan.interpret or name != "bf16"):
                    continue
                layout = LAYOUTS[name]
                pages = pages_for(layout, 3, context, 2, plan)  # fewer than DISTINCT: a wrong page would show
                last = PAGE if op == "prefill" else 1
                positions = jnp.array([context - last, 70 if op == "decode" else PAGE, -1], jnp.int32)
                counts = jnp.array([last, last, 0], jnp.int32)
                q = queries(op, 3, plan)
                expected, got = (
                    attended(each, q, positions, counts, pages, layout, plan, **more)
                    for each, more in ((REFERENCES[op], {}), (kernel, options(plan, backend)))
                )
                off = float(np.max(np.abs(got - expected)))
                # bfloat16 products: softmax weights and queries are rounded to 8 bits of mantissa.
                yield op, backend, name, off, bool(off < 3e-2)


def attended(
    kernel: Callable[..., Attended],
    q: jax.Array,
    positions: jax.Array,
    counts: jax.Array,
    pages: Pages,
    layout: Any,
    plan: Plan,
    **more: Any,
) -> np.ndarray:
    """What `kernel` makes of layer 1 of the pages, normalized."""

    def call(q: jax.Array, pool: Any) -> jax.Array:
        scale = plan.config.head_dim**-0.5
        more_options = {"scale": scale, "window": None, "softcap": None, "layout": layout, **more}
        return normalize(kernel(q, positions, pool, 1, pages.tables, counts=counts, **more_options))

    return np.asarray(jax.jit(call)(q, pages.pool))


def kernel_time(
    op: str, backend: str, layout: Any, rows: int, context: int, plan: Plan, layer_major: bool, **more: Any
) -> tuple[float, int] | None:
    """Seconds of one call of a kernel over `rows` rows of `context` tokens, and the bytes of KV it reads. `more`:
    options of the kernel."""
    config, layers = plan.config, plan.layers
    tiles = op == "prefill"
    holders = 1 if tiles else rows
    size = holders * (context // PAGE) * page_bytes(layout, config.kv_heads, config.head_dim)
    if not fits(2 * size * layers):
        return None
    if layer_major:
        pages = pages_for(layout, holders, context, 1, plan)
        pools = [pages.pool] + [jax.tree.map(jnp.copy, pages.pool) for _ in range(layers - 1)]
    else:
        pages = pages_for(layout, holders, context, layers, plan)
        pools = [pages.pool]
    kernel = OPS[op][backend]
    q = queries(op, rows, plan)
    if tiles:
        positions = context - (rows - jnp.arange(rows, dtype=jnp.int32)) * PAGE
        tables = jnp.broadcast_to(pages.tables, (rows, context // PAGE))
        counts = jnp.full((rows,), PAGE, jnp.int32)
    else:
        positions = jnp.full((rows,), context - 1, jnp.int32)
        tables, counts = pages.tables, jnp.ones((rows,), jnp.int32)

    @jax.jit
    def all_layers(q: jax.Array, pools: list[Any]) -> jax.Array:
        for layer in range(layers):
            part = kernel(
                q,
                positions,
                pools[layer if layer_major else 0],
                0 if layer_major else layer,
                tables,
                counts=counts,
                scale=config.head_dim**-0.5,
                window=None,
                softcap=None,
                layout=layout,
                **options(plan, backend),
                **more,
            )
            q = q + normalize(part).astype(q.dtype)
        return q

    return seconds(lambda: all_layers(q, pools), plan) / layers, size


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
    pool = fill(format.layout, pages, 1, config.kv_heads, config.head_dim)
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


def chunks(plan: Plan, say: Callable[[str], None]) -> bool:
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


def report(plan: Plan, say: Callable[[str], None]) -> bool:
    """Runs everything; False if a kernel was wrong."""
    device = jax.devices()[0]
    config = plan.config
    say(f"# GPU day: {device.device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}\n")
    copy = bandwidth(plan)
    say(f"Copy bandwidth: {copy / 1e9:,.0f} GB/s (reads and writes, {plan.copy_bytes >> 20} MiB).\n")

    say(
        "## Correctness against the reference\n\n"
        "| op | backend | pages | largest difference | |\n|---|---|---|---:|---|"
    )
    good = True
    for op, backend, name, off, right in correctness(plan):
        good &= right
        say(f"| {op} | {backend} | {name} | {off:.4f} | {'ok' if right else '**WRONG**'} |")

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
                    for name in plan.layouts:
                        if backend == "mosaic" and (plan.interpret or name != "bf16"):
                            continue
                        say(kernel_row(op, backend, name, LAYOUTS[name], rows, context, plan, copy))

    good &= chunks(plan, say)
    say(
        "\n## 8B decode steps\n\nMilliseconds; the share is the least time for weights and KV at the copy "
        "bandwidth over the measured time.\n\n| pages | batch | context | ms | share |\n|---|---:|---:|---:|---:|"
    )
    model = Model.from_config(config, jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0))
    read = params | {"embedding": {"head": params["embedding"]["head"]}}  # of the table, a few rows
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(read))
    (group,) = model.kv_groups()
    for name in formats.names():
        if name in ("f16", "f32"):
            continue
        format = step_format(name, plan)
        for batch in plan.batches:
            for context in plan.contexts:
                took = step_time(format, batch, context, plan, params, model)
                if took is None:
                    say(f"| {name} | {batch} | {context} | - | |")
                    continue
                least = (weights + batch * step_bytes(format, group, context // PAGE)) / copy
                say(f"| {name} | {batch} | {context} | {took * 1e3:.2f} | {least / took:.0%} |")
    return good


def kernel_row(op: str, backend: str, name: str, layout: Any, rows: int, context: int, plan: Plan, copy: float) -> str:
    head = f"| {op} | {backend} | {name} | {rows} | {context} |"
    timed = kernel_time(op, backend, layout, rows, context, plan, layer_major=False)
    if timed is None:
        return f"{head} - | | | |"
    took, size = timed
    other = kernel_time(op, backend, layout, rows, context, plan, layer_major=True)
    rate = size / took
    layer_major = "-" if other is None else f"{other[0] * 1e6:,.1f}"
    return f"{head} {took * 1e6:,.1f} | {rate / 1e9:,.0f} | {rate / copy:.0%} | {layer_major} |"


def sink(smoke: bool, out: Path | None) -> Callable[[str], None] | None:
    """Prints each text, and writes all of them to `out`. None, and says so, where there is no GPU to be timed."""
    if not smoke and jax.default_backend() not in ("gpu", "cuda"):
        print(
            f"no GPU: jax runs on {jax.default_backend()} here; --smoke tries the script without one", file=sys.stderr
        )
        return None
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)
        if out:
            out.write_text("\n".join(lines) + "\n")

    return say


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, interpret mode: checks this script, times nothing"
    )
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    say = sink(args.smoke, args.out)
    if say is None:
        return 2
    return 0 if report(SMOKE if args.smoke else FULL, say) else 1


if __name__ == "__main__":
    sys.exit(main())
