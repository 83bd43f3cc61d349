"""The page walk of the reference attention ops: online softmax, one page a step. Knows no KV format and no backend.

Both paged ops are this walk; they differ in how many queries a row has. A step costs one page per row, and there are as
many steps as the longest row needs, whatever the width of the tables.
"""

from __future__ import annotations

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
    layer: int,
    tables: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    layout: Layout,
) -> Attended:
    """Causal attention of `q` [rows, q_tokens, heads, head_dim] over the pages of `tables` int32 [rows, max_pages].

    Query i of a row stands at `positions[row] + i`; a row with position -1 sees nothing. Every result bit of a row
    depends on that row alone: a step that is masked for it multiplies by exp(0) and adds 0.
    """
    rows, q_tokens, heads, head_dim = q.shape
    pages, kv_heads, page_tokens, _ = layout.page_shape(pool)
    group = heads // kv_heads
    grouped = (q.astype(jnp.float32) * scale).reshape(rows, q_tokens, kv_heads, group, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * q_tokens, head_dim)

    live = positions >= 0
    q_pos = jnp.where(live[:, None], positions[:, None] + jnp.arange(q_tokens), -1)
    end = jnp.minimum(jnp.max(q_pos) // page_tokens + 1, tables.shape[1])
    begin = jnp.zeros((), jnp.int32)
    if window is not None:
        first_key = jnp.maximum(positions - window + 1, 0)
        begin = jnp.min(jnp.where(live, first_key // page_tokens, end)).astype(jnp.int32)

    def visible(index: jax.Array, ids: jax.Array) -> jax.Array:
        k_pos = index * page_tokens + jnp.arange(page_tokens)
        mask = (k_pos <= q_pos[:, :, None]) & (ids >= 0)[:, None, None] & (ids < pages)[:, None, None]
        if window is not None:
            mask &= k_pos > q_pos[:, :, None] - window
        mask = jnp.broadcast_to(mask[:, None], (rows, group, q_tokens, page_tokens))
        return mask.reshape(rows, 1, group * q_tokens, page_tokens)

    def step(carry: tuple[jax.Array, Attended]) -> tuple[jax.Array, Attended]:
        index, (o, m, l) = carry  # noqa: E741
        ids = lax.dynamic_index_in_dim(tables, index, axis=1, keepdims=False)
        page = layout.fetch(pool, layer, jnp.clip(ids, 0, pages - 1))
        mask = visible(index, ids)
        s = layout.scores(grouped, page)
        if softcap is not None:
            s = softcap * jnp.tanh(s / softcap)
        s = jnp.where(mask, s, NO_KEY)
        m_new = jnp.maximum(m, jnp.max(s, axis=-1))
        p = jnp.where(mask, jnp.exp(s - m_new[..., None]), 0.0)
        keep = jnp.exp(m - m_new)
        l = l * keep + jnp.sum(p, axis=-1)  # noqa: E741
        o = o * keep[..., None] + layout.mix(p, page)
        return index + 1, Attended(o, m_new, l)

    flat = (rows, kv_heads, group * q_tokens)
    nothing = Attended(jnp.zeros((*flat, head_dim)), jnp.full(flat, NO_KEY), jnp.zeros(flat))
    _, part = lax.while_loop(lambda carry: carry[0] < end, step, (begin, nothing))
    return jax.tree.map(lambda x: _ungroup(x, q_tokens), part)


def _ungroup(x: jax.Array, q_tokens: int) -> jax.Array:
    """[rows, kv_heads, group * q_tokens, ...] -> [rows, q_tokens, heads, ...]."""
    rows, kv_heads, m = x.shape[:3]
    x = x.reshape(rows, kv_heads, m // q_tokens, q_tokens, *x.shape[3:])
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(rows, q_tokens, kv_heads * (m // q_tokens), *x.shape[4:])
