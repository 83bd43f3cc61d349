"""Decode attention over each KV format on this machine, in turn, as ratios to the first.

    python benchmarks/kv_formats.py --formats f16 f32 int8 fp8_e4m3 --rows 16 --context 1024

A call writes one token a row and attends, through every layer of the pool, as a decode step does. Rounds take the
formats in turn; the table has medians of rounds and the median of the ratios within a round, which other load disturbs
less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kv import allocate, attend_layer, build_meta, formats, kv_shapes
from jaxserve.kv.token_format import TokenFormat
from jaxserve.types import PAGE_TOKENS, KVGroup


class Spec(NamedTuple):
    scale: float
    window: int | None = None
    softcap: float | None = None


def decode(name: str, args: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A call that decodes one token a row, and the bytes of KV that it reads."""
    format = formats.get(name)
    if not isinstance(format, TokenFormat):
        raise SystemExit(f"--formats {name}: only formats with one page class are compared here")
    group = KVGroup(layers=tuple(range(args.layers)), kv_heads=args.kv_heads, head_dim=args.head_dim)
    per_row = -(-args.context // PAGE_TOKENS)
    kv = allocate(kv_shapes([group], [format], [(args.rows * per_row,)], args.rows, args.context))
    ids = np.random.default_rng(0).permutation(args.rows * per_row).astype(np.int32)
    kv = replace(kv, tables=(jnp.asarray(ids.reshape(1, args.rows, per_row)),))
    rows = jnp.arange(args.rows, dtype=jnp.int32)
    none = jnp.zeros((0,), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (args.kv_heads * args.group, args.kv_heads, args.kv_heads)
    q, k, v = (jax.random.normal(key, (args.rows, n, args.head_dim)) for key, n in zip(keys, heads, strict=True))

    def step(kv: Any, q: jax.Array) -> tuple[Any, jax.Array]:
        positions = jnp.full((args.rows,), args.context - 1, jnp.int32)
        meta = build_meta(kv.tables, rows, positions, jnp.ones_like(rows), none, none, none)
        for layer in range(args.layers):
            kv, out = attend_layer(kv, 0, layer, q, k, v, meta, Spec(args.head_dim**-0.5))
            q = q + out
        return kv, q

    jitted = jax.jit(step, donate_argnums=0)
    state = [kv]

    def call() -> None:
        state[0], out = jitted(state[0], q)
        jax.block_until_ready(out)

    return call, args.rows * per_row * format.kinds(group)[0].bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["f16", "bf16", "f32", "int8", "fp8_e4m3"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024, help="tokens a row")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--group", type=int, default=4, help="query heads for each KV head")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    calls = {name: decode(name, args) for name in args.formats}
    for call, _ in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, (call, _) in calls.items():
            start = time.perf_counter()
            for _ in range(3):
                call()
            times[name].append((time.perf_counter() - start) / 3)
    first = times[args.formats[0]]
    print(
        f"{args.rows} rows x {args.context} tokens, {args.layers} layers, {args.kv_heads} KV heads of {args.head_dim}\n"
    )
    print(f"| format | KV MiB | ms | time over {args.formats[0]} |\n|---|---:|---:|---:|")
    for name, (_, size) in calls.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], first, strict=True))
        print(f"| {name} | {size / 2**20:.1f} | {statistics.median(times[name]) * 1e3:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
