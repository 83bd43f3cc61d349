"""What scripts of a GPU day have in common: sizes, pools full of pages, and the attention kernels checked and timed."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.aot.steps import LLAMA_8B
from jaxserve.models.config import DecoderConfig
from pallas_kernels.layouts import Dense, EightBitRows, FloatRows, Fp8, Int8, Kivi, hack
from pallas_kernels.merge import Attended, normalize
from pallas_kernels.paged_decode import mosaic as decode_mosaic
from pallas_kernels.paged_decode import reference as decode_reference
from pallas_kernels.paged_decode import triton as decode_triton
from pallas_kernels.paged_prefill import mosaic as prefill_mosaic
from pallas_kernels.paged_prefill import reference as prefill_reference
from pallas_kernels.paged_prefill import triton as prefill_triton

PAGE = 64
DISTINCT = 17
Say = Callable[[str], None]


class Kind(NamedTuple):
    """Pages of a kernel. `keys`, `values`: share of a head's channels that they hold, the leading ones."""

    layout: Any
    keys: float = 1.0
    values: float = 1.0

    def channels(self, head_dim: int) -> tuple[int, int]:
        return int(self.keys * head_dim), int(self.values * head_dim)


KINDS = {
    "bf16": Kind(Dense(jnp.bfloat16)),
    "int8": Kind(EightBitRows(Int8())),
    "fp8": Kind(EightBitRows(Fp8())),
    "kivi4": Kind(Kivi(4)),
    "kivi2": Kind(Kivi(2)),
    "hack8": Kind(hack(8)),
    "hack4": Kind(hack(4)),
    "hack2": Kind(hack(2)),
    "hack8_p": Kind(hack(8, "P")),
    "hack4_p": Kind(hack(4, "P")),
    "hack2_p": Kind(hack(2, "P")),
    "zeroc": Kind(FloatRows(), 0.75, 0.5),
}
"""By name, in the order of the tables."""
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
    kinds: tuple[str, ...]


FULL = Plan(
    config=LLAMA_8B,
    batches=(1, 16, 64, 256),
    contexts=(1024, 4096, 16384, 65536),
    tiles=(8, 32),
    layers=8,
    copy_bytes=4 << 30,
    repeats=7,
    interpret=False,
    kinds=tuple(KINDS),
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
    kinds=("bf16", "int8", "hack2", "zeroc"),
)


@dataclasses.dataclass(frozen=True)
class Pages:
    """A pool and rows that share none of its pages, in scattered order."""

    pool: Any
    tables: jax.Array
    bytes: int


def fill(kind: Kind, pages: int, layers: int, kv_heads: int, head_dim: int) -> Any:
    """A pool of `kind` with random keys and values: DISTINCT different pages, repeated over pages and layers."""
    layout = kind.layout
    k, v = jax.random.normal(jax.random.key(0), (2, DISTINCT, kv_heads, PAGE, head_dim), jnp.bfloat16)
    k, v = (x[..., :held] for x, held in zip((k, v), kind.channels(head_dim), strict=True))
    if hasattr(layout, "put_pages"):
        shapes = layout.pool(DISTINCT, 1, kv_heads, PAGE, head_dim)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        some = layout.put_pages(empty, 0, k, v, jnp.arange(DISTINCT), jnp.ones((DISTINCT, PAGE), bool))
    else:
        some = {name: array[:, None] for name, array in layout.encode(k, v).items()}
    which = (jnp.arange(pages)[:, None] + 5 * jnp.arange(layers)) % DISTINCT
    return jax.jit(lambda some: jax.tree.map(lambda x: x[which, 0], some))(some)


def page_bytes(kind: Kind, kv_heads: int, head_dim: int) -> int:
    """Of one layer of a page."""
    one = jax.eval_shape(lambda: fill(kind, 1, 1, kv_heads, head_dim))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))


def pages_for(kind: Kind, rows: int, context: int, layers: int, plan: Plan) -> Pages:
    per_row = context // PAGE
    config = plan.config
    pool = fill(kind, rows * per_row, layers, config.kv_heads, config.head_dim)
    ids = np.random.default_rng(0).permutation(rows * per_row).astype(np.int32)
    size = rows * per_row * page_bytes(kind, config.kv_heads, config.head_dim)
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


def queries(op: str, rows: int, kind: Kind, plan: Plan) -> jax.Array:
    keys, _ = kind.channels(plan.config.head_dim)
    shape = (rows, 1 if op == "decode" else PAGE, plan.config.heads, keys)
    return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)


def runs(backend: str, name: str, plan: Plan) -> bool:
    """Whether there is a kernel of this backend for pages called `name`."""
    return backend == "triton" or (name == "bf16" and not plan.interpret)


def correctness(plan: Plan) -> Iterator[tuple[str, str, str, float, bool]]:
    """(op, backend, pages, largest difference to the reference, whether that is within rounding)."""
    context = 4 * PAGE
    for op, backends in OPS.items():
        for backend, kernel in backends.items():
            for name in plan.kinds:
                if not runs(backend, name, plan):
                    continue
                kind = KINDS[name]
                pages = pages_for(kind, 3, context, 2, plan)  # fewer than DISTINCT: a wrong page would show
                last = PAGE if op == "prefill" else 1
                positions = jnp.array([context - last, 70 if op == "decode" else PAGE, -1], jnp.int32)
                counts = jnp.array([last, last, 0], jnp.int32)
                q = queries(op, 3, kind, plan)
                expected, got = (
                    attended(each, q, positions, counts, pages, kind.layout, plan, **more)
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
    op: str, backend: str, kind: Kind, rows: int, context: int, plan: Plan, layer_major: bool, **more: Any
) -> tuple[float, int] | None:
    """Seconds of one call of a kernel over `rows` rows of `context` tokens, and the bytes of KV it reads. `more`:
    options of the kernel."""
    config, layers = plan.config, plan.layers
    tiles = op == "prefill"
    holders = 1 if tiles else rows
    size = holders * (context // PAGE) * page_bytes(kind, config.kv_heads, config.head_dim)
    if not fits(2 * size * layers):
        return None
    if layer_major:
        pages = pages_for(kind, holders, context, 1, plan)
        pools = [pages.pool] + [jax.tree.map(jnp.copy, pages.pool) for _ in range(layers - 1)]
    else:
        pages = pages_for(kind, holders, context, layers, plan)
        pools = [pages.pool]
    kernel = OPS[op][backend]
    q = queries(op, rows, kind, plan)
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
                layout=kind.layout,
                **options(plan, backend),
                **more,
            )
            q = q + normalize(part)[..., :1].astype(q.dtype)  # the next call needs this one's result
        return q

    return seconds(lambda: all_layers(q, pools), plan) / layers, size


def sink(smoke: bool, out: Path | None) -> Say | None:
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
