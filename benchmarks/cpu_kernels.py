"""The C kernels of CPUs against what XLA makes of the same operations, in turn.

    python benchmarks/cpu_kernels.py --rows 16 --context 640

Shapes are those of a model (default: the bundled one), weights random numbers that bfloat16 holds. KV lies in pages in
no order. A run goes through the weights and pages of all layers, as a step does, so that waiting for memory is part of
the time. The best of some runs counts: a shared machine only ever adds to it. The second table is attention again, over
each way to hold KV; its last column compares with the C kernel on pages of bfloat16.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import bundled
from jaxserve.checkpoint import read_config
from jaxserve.models import Model
from jaxserve.models.config import DecoderConfig
from jaxserve.models.native import native_params
from jaxserve.quant import linear, quantize
from jaxserve.sim.report import aligned
from jaxserve.types import PAGE_SIZES, PAGE_TOKENS
from pallas_kernels.layouts import (
    Columns,
    EightBitColumns,
    FloatColumns,
    Fp8,
    HostDense,
    HostEightBitRows,
    HostFloatRows,
    Int8,
    Kivi,
    hack,
)
from pallas_kernels.native.build import compiler
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill

Case = tuple[str, float, Callable[[], Any], Callable[[], Any]]
"""What, its floating-point operations, the C kernel and XLA's way."""


PAGES: dict[str, tuple[Any, Any]] = {
    "bf16": (HostDense(jnp.bfloat16), Columns(jnp.bfloat16)),
    "int8": (HostEightBitRows(Int8()), EightBitColumns(Int8())),
    "fp8_e4m3": (HostEightBitRows(Fp8()), EightBitColumns(Fp8())),
    **{f"kivi{bits}": (Kivi(bits), Kivi(bits)) for bits in (4, 2)},
    **{f"hack{bits}": (hack(bits), hack(bits)) for bits in (8, 4, 2)},
    "hack4_p": (hack(4, "P"), hack(4, "P")),
    "zeroc": (HostFloatRows(), FloatColumns()),
}
"""For each way to hold KV, the layout that the C kernel reads and the one that XLA's way reads best."""


def attention(
    pages: str,
    config: DecoderConfig,
    rows: int,
    context: int,
    draw: np.random.Generator,
    tokens: int = 1,
    size: int = PAGE_TOKENS,
) -> Case:
    """The last `tokens` of each row attend. `size`: tokens of a page."""
    count = -(-context // size)
    q = jnp.asarray(draw.normal(size=(rows, tokens, config.heads, config.head_dim)), jnp.float32)
    tables = jnp.asarray(draw.permutation(rows * count).reshape(rows, count), jnp.int32)
    positions = jnp.full(rows, context - tokens, jnp.int32)
    op = paged_decode if tokens == 1 else paged_prefill
    shape = (rows * count, config.kv_heads, size, config.head_dim)
    kv = [jnp.asarray(draw.normal(size=(2, *shape)), jnp.bfloat16) for _ in range(config.layers)]

    def ready(backend: str, layout: Any) -> Callable[[], Any]:
        options = {"scale": config.attention_scale, "layout": layout, "backend": backend}
        call = jax.jit(lambda pools: [op(q, positions, pool, 0, tables, **options).o for pool in pools])
        fill = jax.jit(lambda k, v: filled(layout, k, v))
        pools = [fill(k, v) for k, v in kv]
        return lambda: call(pools)

    work = 4.0 * rows * tokens * config.heads * context * config.head_dim * config.layers
    return "attention", work, *map(ready, ("native", "reference"), PAGES[pages])


def filled(layout: Any, k: jax.Array, v: jax.Array) -> Any:
    """A pool of one layer whose pages are k, v [pages, kv_heads, page_tokens, head_dim]."""
    if not hasattr(layout, "put_pages"):
        return {name: array[:, None] for name, array in layout.encode(k, v).items()}
    pages, kv_heads, page_tokens, head_dim = k.shape
    empty = jax.tree.map(jnp.zeros_like, layout.pool(pages, 1, kv_heads, page_tokens, head_dim))
    return layout.put_pages(empty, 0, k, v, jnp.arange(pages), jnp.ones((pages, page_tokens), bool))


def product(name: str, shapes: list[tuple[int, int]], format: str, rows: int, draw: np.random.Generator) -> Case:
    xs = [jnp.asarray(draw.normal(size=(rows, inner)), jnp.float32) for inner, _ in shapes]
    plain = [draw.normal(size=shape).astype(jnp.bfloat16).astype(np.float32) for shape in shapes]
    call = jax.jit(lambda weights: [linear(x, weight) for x, weight in zip(xs, weights, strict=True)])
    packed = [jax.tree.map(jnp.asarray, quantize(format, weight)) for weight in plain]
    arrays = [jnp.asarray(weight) for weight in plain]
    work = 2.0 * rows * sum(inner * outer for inner, outer in shapes)
    return name, work, lambda: call(packed), lambda: call(arrays)


def layers(config: DecoderConfig, rows: int) -> Case:
    """All layers of the model, where heads attend to nothing."""
    model = Model.from_config(config, jnp.float32)

    def params() -> Any:
        drawn = model.init(jax.random.key(0))
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), drawn)

    tokens = jnp.arange(rows)
    attend = lambda layer, kv, q, k, v: (kv, q)  # noqa: E731
    call = jax.jit(lambda params: model.forward(params, tokens, tokens, None, attend)[0])
    packed, plain = native_params(model, params()), params()
    return "layers but attention", 0.0, lambda: call(packed), lambda: call(plain)


def milliseconds(calls: Sequence[Callable[[], Any]], runs: int) -> list[float]:
    """The best of each, run in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(1 + runs):  # the first compiles
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            best[i] = min(best[i], time.perf_counter() - start)
    return [1e3 * seconds for seconds in best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=bundled.path(), help="folder; its config.json alone is read")
    parser.add_argument("--rows", type=int, default=16, help="sequences decoding; for products, tokens of a step")
    parser.add_argument("--context", type=int, default=640, help="tokens a sequence")
    parser.add_argument(
        "--tile", type=int, default=1, help="second table: query tokens a row; a page of them is a prefill tile"
    )
    parser.add_argument("--block-size", type=int, default=PAGE_TOKENS, choices=PAGE_SIZES, help="tokens of a page")
    parser.add_argument("--runs", type=int, default=50, help="of each side")
    args = parser.parse_args()
    if compiler() is None:
        parser.error("there is no C compiler on this machine, or JAXSERVE_NATIVE=0 hides it: nothing to compare")
    config, draw = read_config(args.model), np.random.default_rng(0)
    heads = (config.heads + 2 * config.kv_heads) * config.head_dim
    layer = [(config.hidden, heads), (config.heads * config.head_dim, config.hidden)]
    layer += [(config.hidden, 2 * config.intermediate), (config.intermediate, config.hidden)]
    cases = [
        attention("bf16", config, args.rows, args.context, draw, size=args.block_size),
        product("products of all layers, one by one", layer * config.layers, "panels", args.rows, draw),
        layers(config, args.rows),
        product("logits", [(config.hidden, config.vocab_size)], "table", args.rows, draw),
    ]
    table = [["operation", "C ms", "GFLOP/s", "XLA ms", "XLA / C"]]
    for name, work, kernel, plain in cases:
        ours, theirs = milliseconds((kernel, plain), args.runs)
        rate = f"{work / ours / 1e6:.0f}" if work else ""
        table.append([name, f"{ours:.2f}", rate, f"{theirs:.2f}", f"{theirs / ours:.1f}"])
    print(f"{args.model.name}, {args.rows} rows, {args.context} tokens each, {os.cpu_count()} cores")
    print(aligned(table))

    names = list(PAGES)
    shape = (config, args.rows, args.context, draw, args.tile, args.block_size)
    calls = [call for name in names for call in attention(name, *shape)[2:]]
    best = milliseconds(calls, args.runs)
    table = [["pages", "C ms", "XLA ms", "XLA / C", "C over bf16"]]
    for name, ours, theirs in zip(names, best[::2], best[1::2], strict=True):
        table.append([name, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}", f"{ours / best[0]:.2f}"])
    print(f"\nattention of {args.tile} tokens a row, by what pages hold\n{aligned(table)}")


if __name__ == "__main__":
    main()
