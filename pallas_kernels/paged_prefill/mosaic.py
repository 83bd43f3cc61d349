"""Paged prefill attention for Hopper (Pallas Mosaic GPU): two heads of a group share each page, where there are two."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layouts import KernelLayout
from pallas_kernels.merge import Attended
from pallas_kernels.mosaic_walk import BLOCK, mosaic_walk, supports
from pallas_kernels.paged_prefill import triton


def paged_prefill(
    q: jax.Array,
    positions: jax.Array,
    pool: Any,
    layer: int | jax.Array,
    tables: jax.Array,
    *,
    layout: KernelLayout,
    interpret: Any = None,
    **options: Any,
) -> Attended:
    """See `api.paged_prefill`. What Mosaic does not support here runs on the Triton kernel."""
    tiles, q_tokens, heads, head_dim = q.shape
    if not supports(q, pool, layout) or q_tokens != BLOCK:
        return triton.paged_prefill(q, positions, pool, layer, tables, layout=layout, **options)
    group = heads // layout.page_shape(pool)[1]
    blocks = 2 if group % 2 == 0 else 1
    part = mosaic_walk(
        q.swapaxes(1, 2).reshape(tiles, heads // blocks, blocks, q_tokens, head_dim),
        positions,
        pool,
        layer,
        tables,
        q_tokens=q_tokens,
        splits=1,
        name="paged_prefill",
        interpret=interpret,
        **options,
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(tiles, heads, q_tokens, *x.shape[5:]), 2, 1), part)
