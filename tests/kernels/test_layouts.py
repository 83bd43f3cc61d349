"""Layouts whose tokens are written one by one: what was put is what is fetched, and nothing else changes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layouts import (
    Columns,
    Dense,
    EightBitColumns,
    EightBitRows,
    FloatLayout,
    Fp8,
    HostDense,
    HostEightBitRows,
    Int8,
    TokenLayout,
)

PAGES, LAYERS, HEADS, TOKENS, DIM = 5, 2, 3, 8, 16
EVERY = np.arange(PAGES)
LAYOUTS = [
    pytest.param(kind(jnp.dtype(dtype)), id=f"{kind.__name__}-{dtype}")
    for kind in (Dense, HostDense, Columns)
    for dtype in ("float32", "float16", "bfloat16")
]


def read(layout: TokenLayout, pool: Any, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """What queries and weights see: q K^T and p V with unit vectors, [pages, heads, tokens, dim] each."""
    page = layout.fetch(pool, layer, EVERY)
    q, p = (jnp.broadcast_to(jnp.eye(n), (PAGES, HEADS, n, n)) for n in (DIM, TOKENS))
    return np.asarray(layout.scores(q, page)).swapaxes(2, 3), np.asarray(layout.mix(p, page))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_put_is_what_is_read(layout: TokenLayout) -> None:
    rng = np.random.default_rng(0)
    pool = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), layout.pool(PAGES, LAYERS, HEADS, TOKENS, DIM))
    assert layout.page_shape(pool) == (PAGES, HEADS, TOKENS, DIM, DIM)
    expected = np.zeros((2, PAGES, HEADS, TOKENS, DIM), np.float32)

    whole = rng.standard_normal((2, 3, HEADS, TOKENS, DIM)).astype(np.float32)
    inside = rng.random((3, TOKENS)) < 0.7
    ids = np.array([4, PAGES, 1], np.int32)
    pool = jax.jit(layout.put_pages, static_argnums=1)(pool, 1, *whole, ids, inside)
    single = rng.standard_normal((2, 2, HEADS, DIM)).astype(np.float32)
    pool = jax.jit(layout.put_tokens, static_argnums=1)(pool, 1, *single, np.array([1, PAGES]), np.array([5, 0]))

    for i, page in enumerate(ids):
        if page < PAGES:
            expected[:, page] = np.where(inside[i][:, None], whole[:, i], expected[:, page])
    expected[:, 1, :, 5] = single[:, 0]
    expected = np.asarray(jnp.asarray(expected).astype(layout.dtype).astype(jnp.float32))
    assert np.array_equal(np.stack(read(layout, pool, 1)), expected)
    assert not np.any(read(layout, pool, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_come_back_bit_for_bit(layout: FloatLayout) -> None:
    k, v = (
        jnp.asarray(np.random.default_rng(i).standard_normal((3, HEADS, TOKENS, DIM))).astype(layout.dtype)
        for i in range(2)
    )
    pool = layout.pool_of(k, v)
    assert layout.page_shape(pool) == (3, HEADS, TOKENS, DIM, DIM)
    for got, put in zip(layout.get_pages(pool, 0, jnp.array([2, 0])), (k, v), strict=True):
        assert got.dtype == put.dtype and np.array_equal(got, put[jnp.array([2, 0])])


@pytest.mark.parametrize("code", [Int8(), Fp8()])
def test_rows_and_columns_hold_the_same_codes(code: Int8 | Fp8) -> None:
    """The layouts of kernels and of the reference, after the same writes, calibrated scales of layer 1 included."""
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((2, 3, HEADS, TOKENS, DIM)).astype(np.float32)
    single = rng.standard_normal((2, 2, HEADS, DIM)).astype(np.float32)
    inside = rng.random((3, TOKENS)) < 0.7
    for calibrated in ((), ((1.0, 1.0), (0.25, 0.5))):
        pages = []
        for layout in (
            EightBitRows(code, calibrated),
            HostEightBitRows(code, calibrated),
            EightBitColumns(code, calibrated),
        ):
            pool = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), layout.pool(PAGES, LAYERS, HEADS, TOKENS, DIM))
            assert layout.page_shape(pool) == (PAGES, HEADS, TOKENS, DIM, DIM)
            assert all(pool[name].shape[axis] == HEADS for name, axis in layout.heads_axis().items())
            pool = jax.jit(layout.put_pages, static_argnums=1)(pool, 1, *whole, np.array([4, PAGES, 1]), inside)
            pool = jax.jit(layout.put_tokens, static_argnums=1)(
                pool, 1, *single, np.array([1, PAGES]), np.array([5, 0])
            )
            untouched, written = jax.jit(lambda pool, layout=layout: [layout.fetch(pool, n, EVERY) for n in (0, 1)])(
                pool
            )
            assert not any(np.any(x) for x in untouched)
            pages.append(written)
        for rows, host, columns in zip(*pages, strict=True):
            assert np.array_equal(rows, host) and np.array_equal(rows, columns)
        if calibrated:
            scales = np.asarray(rows)[1, :, :2, 5]
            assert np.all(scales == np.array([0.25, 0.5]))
