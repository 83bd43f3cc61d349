"""Inputs of the paged attention ops and their definition in numpy, float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import Columns, Dense, EightBitColumns, EightBitRows, Fp8, HostDense, HostEightBitRows, Int8
from pallas_kernels.merge import Attended
from pallas_kernels.paged_decode import triton as decode_triton
from pallas_kernels.paged_prefill import triton as prefill_triton

PAGE = 64
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Compiles in a fifth of the time. For inputs, kernels of GPUs as Pallas interprets them, and programs whose values are
compared within a tolerance; bits are looked at as engines have them compiled."""
TRITON: dict[str, Callable[..., Attended]] = {
    "decode": functools.partial(decode_triton.paged_decode, splits=2, interpret=True),
    "prefill": functools.partial(prefill_triton.paged_prefill, interpret=True),
}
LAYOUTS: dict[str, Any] = {
    "dense": Dense(),
    "dense columns": Columns(),
    "dense host": HostDense(jnp.dtype(jnp.bfloat16)),
    "int8": EightBitRows(Int8()),
    "int8 columns": EightBitColumns(Int8()),
    "int8 host": HostEightBitRows(Int8()),
    "fp8": EightBitRows(Fp8()),
    "fp8 columns": EightBitColumns(Fp8()),
    "fp8 host": HostEightBitRows(Fp8()),
}


@dataclass(frozen=True)
class Case:
    """Rows at `positions` (of the first query; -1 is padding) with `counts` real queries each, over permuted pages."""

    positions: tuple[int, ...]
    counts: tuple[int, ...]
    q_tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    window: int | None = None
    softcap: float | None = None
    dtype: str = "float32"
    layout: str = "dense"
    outliers: float = 1.0
    """Factor on two channels of the keys and one of the values."""
    spare_pages: int = 3
    layers: int = 2
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Inputs:
    q: jax.Array
    positions: jax.Array
    counts: jax.Array
    pool: Any
    tables: jax.Array

    def take(self, rows: list[int]) -> Inputs:
        index = np.array(rows)
        return Inputs(self.q[index], self.positions[index], self.counts[index], self.pool, self.tables[index])


@functools.cache
def jitted(function: Callable) -> Callable:
    """Compiled once for all tests that make inputs with it; `jax.jit` knows a bound method only while it lives."""
    return jax.jit(function, compiler_options=QUICKLY)


def inputs(case: Case) -> Inputs:
    """Every row has exactly the pages it needs; further table entries are absent, as ids out of range."""
    rng = np.random.default_rng(case.seed)
    rows = len(case.positions)
    needed = [0 if p < 0 else (p + c - 1) // PAGE + 1 for p, c in zip(case.positions, case.counts, strict=True)]
    pages = sum(needed) + case.spare_pages
    ids = rng.permutation(pages)
    tables = np.full((rows, max(needed) + 2), 1 << 30, np.int32)
    for row, count in enumerate(needed):
        tables[row, :count], ids = ids[:count], ids[count:]
    pool = rng.standard_normal((pages, case.layers, 2, case.kv_heads, PAGE, case.head_dim))
    pool[:, :, 0, :, :, 3:30:26] *= case.outliers
    pool[:, :, 1, :, :, 7] *= case.outliers
    q = rng.standard_normal((rows, case.q_tokens, case.heads, case.head_dim))
    return Inputs(
        jnp.asarray(q, case.dtype),
        jnp.asarray(case.positions, jnp.int32),
        jnp.asarray(case.counts, jnp.int32),
        stored(case, pool),
        jnp.asarray(tables),
    )


def attend(
    op: Callable[..., Attended],
    layout: Any,
    case: Case,
    x: Inputs,
    layer: int = 1,
    places: jax.Array | None = None,
    quickly: bool = False,
    **options: Any,
) -> Attended:
    """`op` on the inputs of `case`, compiled once for all tests that run the like."""
    options |= {"layer": layer, "scale": case.scale, "window": case.window, "softcap": case.softcap, "layout": layout}
    call = _quickly if quickly or op in TRITON.values() else _compiled
    return call(op, tuple(options.items()), (x.q, x.positions, x.pool, x.tables), x.counts, places)


def _attend(op: Callable[..., Attended], static: tuple, arrays: tuple, counts: jax.Array, places: Any) -> Attended:
    options = dict(static)
    q, positions, pool, tables = arrays
    return op(q, positions, pool, options.pop("layer"), tables, counts=counts, places=places, **options)


_compiled = jax.jit(_attend, static_argnums=(0, 1))
_quickly = jax.jit(_attend, static_argnums=(0, 1), compiler_options=QUICKLY)


def stored(case: Case, kv: np.ndarray) -> Any:
    """A pool of the case's layout that holds kv [pages, layers, 2, kv_heads, page_tokens, head_dim]."""
    if case.layout == "dense":
        return jnp.asarray(kv, case.dtype)
    layout = LAYOUTS[case.layout]
    pages, layers, _, kv_heads, page_tokens, head_dim = kv.shape
    shapes = layout.pool(pages, layers, kv_heads, page_tokens, head_dim)
    # numpy where it will do: each operation of jax on a new shape is a program of its own.
    pool = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    put = jitted(layout.put_pages)
    for layer in range(layers):
        k, v = (jnp.asarray(kv[:, layer, side], case.dtype) for side in (0, 1))
        pool = put(pool, layer, k, v, np.arange(pages), np.ones((pages, page_tokens), bool))
    return pool


def values(case: Case, pool: Any, layer: int) -> np.ndarray:
    """The numbers that a layer of a pool stands for, float64 [pages, 2, kv_heads, page_tokens, head_dim]."""
    if case.layout == "dense":
        return np.asarray(pool, np.float64)[:, layer]
    layout = LAYOUTS[case.layout]
    page = layout.fetch(pool, layer, jnp.arange(layout.page_shape(pool)[0]))
    k, v = (np.asarray(x, np.float64) for x in page[:2])
    k = k.swapaxes(2, 3)
    if case.layout == "dense columns":
        return np.stack([k, v], axis=1)
    sides = np.asarray(page.sides, np.float64)[..., None]
    k, v = k * sides[:, :, 0], v * sides[:, :, 1]
    return np.stack([k + sides[:, :, 2], v + sides[:, :, 3]] if sides.shape[2] == 4 else [k, v], axis=1)


def expected(case: Case, given: Inputs, layer: int) -> np.ndarray:
    """Softmax attention, float64 [rows, q_tokens, heads, head_dim]; zeros for what sees nothing."""
    q, pool = np.asarray(given.q, np.float64), values(case, given.pool, layer)
    tables = np.asarray(given.tables)
    out = np.zeros(q.shape)
    group = case.heads // case.kv_heads
    for row, (start, count) in enumerate(zip(case.positions, case.counts, strict=True)):
        for token in range(count if start >= 0 else 0):
            p = start + token
            keys = np.arange(0 if case.window is None else max(p - case.window + 1, 0), p + 1)
            kv = pool[tables[row, keys // PAGE]][np.arange(len(keys)), :, :, keys % PAGE]
            for head in range(case.heads):
                s = kv[:, 0, head // group] @ q[row, token, head] * case.scale
                if case.softcap is not None:
                    s = case.softcap * np.tanh(s / case.softcap)
                w = np.exp(s - s.max())
                out[row, token, head] = w @ kv[:, 1, head // group] / w.sum()
    return out
