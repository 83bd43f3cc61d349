"""The page walk of the reference attention ops: online softmax over pages. Knows no KV format and no backend."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.layouts import Layout
from pallas_kernels.merge import NO_KEY, Attended


def walk(
    q: jax.Array,
    positions: jax.Array,
    pool: Any,
    layer: int | jax.Array,
    tables: jax.Array,
    *,
    counts: jax.Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    layout: Layout,
    pages_per_step: int,
    places: jax.Array | None = None,
) -> Attended:
    """Causal attention of `q` [rows, q_tokens, heads, head_dim] over the pages of `tables` int32 [rows, max_pages].

    Query i of a row stands at `positions[row] + i`; a row with position -1 and queries from `counts[row]` on see
    nothing. Entry i of a table is the page at `places[row, i]` of the sequence, by default i. All rows walk together,
    as many steps as the longest one needs, whatever the width of the tables. Every result bit of a row depends on that
    row alone: a step in which it sees nothing multiplies by exp(0) and adds 0.
    """
    rows, q_tokens, heads, head_dim = q.shape
    pages, kv_heads, page_tokens, _, value_dim = layout.page_shape(pool)
    group = heads // kv_heads
    m_rows = group * q_tokens
    n = pages_per_step
    grouped = (q.astype(jnp.float32) * scale).reshape(rows, q_tokens, kv_heads, group, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, m_rows, head_dim)
    grouped = jax.tree.map(functools.partial(_repeat, n), layout.prepare(grouped))

    live = positions >= 0
    token = jnp.arange(q_tokens)
    q_pos = jnp.where(live[:, None] & (token < counts[:, None]), positions[:, None] + token, -1)
    end = jnp.max(q_pos, axis=1) // page_tokens + 1
    begin = jnp.zeros_like(end)
    if window is not None:
        begin = jnp.where(live, jnp.maximum(positions - window + 1, 0) // page_tokens, end)
    entries = tables.shape[1]
    columns = -(-entries // n)
    tables = jnp.pad(tables, ((0, 0), (0, columns * n - entries)), constant_values=pages)
    if places is None:
        places = jnp.arange(columns * n)[None]
        first, last = jnp.min(begin) // n, jnp.minimum(-(-jnp.max(end) // n), columns)
    else:
        places = jnp.pad(places, ((0, 0), (0, columns * n - entries)))
        first, last = jnp.zeros((), begin.dtype), jnp.asarray(columns, begin.dtype)
    present = (tables >= 0) & (tables < pages) & (places >= begin[:, None]) & (places < end[:, None])
    # What a row does not see it reads from page 0 all the same: one page, soon in the cache.
    tables = jnp.where(present, tables, 0)

    def step(carry: tuple[jax.Array, Attended]) -> tuple[jax.Array, Attended]:
        index, (o, m, l) = carry  # noqa: E741
        ids = lax.dynamic_slice_in_dim(tables, index * n, n, axis=1)
        page = layout.fetch(pool, layer, ids.reshape(-1))
        place = lax.dynamic_slice_in_dim(places, index * n, n, axis=1)
        k_pos = (place[..., None] * page_tokens + jnp.arange(page_tokens))[:, :, None]
        seen = k_pos <= q_pos[:, None, :, None]
        if window is not None:
            seen &= k_pos > q_pos[:, None, :, None] - window
        seen &= lax.dynamic_slice_in_dim(present, index * n, n, axis=1)[:, :, None, None]
        seen = jnp.broadcast_to(seen[:, :, None, None], (rows, n, 1, group, q_tokens, page_tokens))
        seen = seen.reshape(rows, n, 1, m_rows, page_tokens)

        s = layout.scores(grouped, page).reshape(rows, n, kv_heads, m_rows, page_tokens)
        if softcap is not None:
            s = softcap * jnp.tanh(s / softcap)
        s = jnp.where(seen, s, NO_KEY)
        m_new = jnp.maximum(m, jnp.max(s, axis=(1, 4)))
        p = jnp.where(seen, jnp.exp(s - m_new[:, None, :, :, None]), 0.0)
        keep = jnp.exp(m - m_new)
        l = l * keep + jnp.sum(p, axis=(1, 4))  # noqa: E741
        mixed = layout.mix(p.reshape(-1, kv_heads, m_rows, page_tokens), page)
        o = o * keep[..., None] + jnp.sum(mixed.reshape(rows, n, kv_heads, m_rows, value_dim), axis=1)
        return index + 1, Attended(o, m_new, l)

    flat = (rows, kv_heads, m_rows)
    nothing = Attended(jnp.zeros((*flat, value_dim)), jnp.full(flat, NO_KEY), jnp.zeros(flat))
    _, part = lax.while_loop(lambda carry: carry[0] < last, step, (first, nothing))
    return jax.tree.map(lambda x: _ungroup(x, q_tokens), part)


def _repeat(n: int, x: jax.Array) -> jax.Array:
    """[rows, ...] -> [rows * n, ...]: every row n times."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], n, *x.shape[1:])).reshape(-1, *x.shape[1:])


def _ungroup(x: jax.Array, q_tokens: int) -> jax.Array:
    """[rows, kv_heads, group * q_tokens, ...] -> [rows, q_tokens, heads, ...]."""
    rows, kv_heads, m = x.shape[:3]
    x = x.reshape(rows, kv_heads, m // q_tokens, q_tokens, *x.shape[3:])
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(rows, q_tokens, kv_heads * (m // q_tokens), *x.shape[4:])
