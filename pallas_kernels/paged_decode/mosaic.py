"""Paged decode attention for Hopper (Pallas Mosaic GPU): one program per row, KV head and share of the pages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layouts import KernelLayout
from pallas_kernels.merge import Attended, merge
from pallas_kernels.mosaic_walk import BLOCK, mosaic_walk, supports
from pallas_kernels.paged_decode import triton
from pallas_kernels.tuning import decode_splits


def paged_decode(
    q: jax.Array,
    positions: jax.Array,
    pool: Any,
    layer: int | jax.Array,
    tables: jax.Array,
    *,
    layout: KernelLayout,
    splits: int | None = None,
    interpret: Any = None,
    **options: Any,
) -> Attended:
    """See `api.paged_decode`. What Mosaic does not support here runs on the Triton kernel: besides formats, more than
    64 query vectors for a KV head."""
    rows, q_tokens, heads, head_dim = q.shape
    kv_heads = layout.page_shape(pool)[1]
    vectors = heads // kv_heads * q_tokens
    if not supports(q, pool, layout) or vectors > BLOCK:
        return triton.paged_decode(q, positions, pool, layer, tables, layout=layout, splits=splits, **options)
    splits = splits or decode_splits(rows, kv_heads)
    grouped = q.reshape(rows, q_tokens, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(rows, kv_heads, 1, vectors, head_dim)
    part = mosaic_walk(
        jnp.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, -vectors % 8), (0, 0))),
        positions,
        pool,
        layer,
        tables,
        q_tokens=q_tokens,
        splits=splits,
        name="paged_decode",
        interpret=interpret,
        **options,
    )
    part = merge([Attended(*(x[:, :, split, 0] for x in part)) for split in range(splits)])
    return jax.tree.map(lambda x: triton.ungroup(x, heads // kv_heads, q_tokens), part)
