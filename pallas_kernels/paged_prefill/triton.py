"""Paged prefill attention as a Pallas kernel (Triton lowering): one program per block of queries and head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.compat import triton_call
from pallas_kernels.layouts import KernelLayout
from pallas_kernels.merge import Attended
from pallas_kernels.triton_walk import load_parts, page_range, store, triton_walk
from pallas_kernels.tuning import Launch, prefill_launch


def paged_prefill(
    q: jax.Array,
    positions: jax.Array,
    pool: Any,
    layer: int | jax.Array,
    tables: jax.Array,
    *,
    counts: jax.Array,
    places: jax.Array | None = None,
    scale: float,
    window: int | None,
    softcap: float | None,
    layout: KernelLayout,
    launch: Launch | None = None,
    interpret: bool = False,
) -> Attended:
    """See `api.paged_prefill`. `launch` is for tuning; its block divides the queries of a tile."""
    tiles, q_tokens, heads, head_dim = q.shape
    pages, kv_heads, page_tokens, _, value_dim = layout.page_shape(pool)
    group = heads // kv_heads
    arrays = layout.arrays(pool)
    q_parts, o_parts = layout.parts(pool)
    lists = () if places is None else (places,)
    dtype = layout.dot_dtype(pool, q)
    launch = launch or prefill_launch(q_tokens, head_dim, dtype, arrays)
    block = launch.block

    def kernel(layer_ref, positions_ref, counts_ref, table_ref, q_ref, *refs):
        place_refs, array_refs, out_refs = refs[: len(lists)], refs[len(lists) : -3], refs[-3:]
        tile, head, start = pl.program_id(0), pl.program_id(1), pl.program_id(2) * block
        position, count, layer = positions_ref[tile], counts_ref[tile], layer_ref[0]
        first, end = page_range(position, count, window, page_tokens, tables.shape[1])
        if place_refs:
            # Typed: the Triton lowering of jax 0.10 takes where(c, 2, 0) for a bool.
            first, end = jnp.int32(0), jnp.where(position >= 0, jnp.int32(tables.shape[1]), jnp.int32(0))
        token = start + jnp.arange(block)
        part = triton_walk(
            load_parts(q_ref, q_parts),
            jnp.where((token < count) & (position >= 0), position + token, -1),
            first,
            end,
            lambda index: table_ref[tile, index],
            lambda index: place_refs[0][tile, index] if place_refs else index,
            layout.in_kernel(array_refs, layer, head // group, interpret=interpret),
            o_parts=o_parts,
            value_dim=value_dim,
            pages=pages,
            page_tokens=page_tokens,
            scale=scale,
            window=window,
            softcap=softcap,
        )
        store(part, *out_refs)

    per_query = pl.BlockSpec((None, None, block), lambda t, h, b: (t, h, b))

    def per_vector(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, block, None, width), lambda t, h, b: (t, b, h, 0))

    o, m, l = triton_call(  # noqa: E741
        kernel,
        jnp.asarray(layer, jnp.int32).reshape(1),
        positions,
        counts,
        tables,
        q.astype(dtype),
        *lists,
        *arrays,
        name="paged_prefill",
        grid=(tiles, heads, q_tokens // block),
        in_specs=[None] * 4 + [per_vector(head_dim)] + [None] * (len(lists) + len(arrays)),
        out_specs=[per_vector(value_dim), per_query, per_query],
        out_shape=[
            jax.ShapeDtypeStruct((*q.shape[:3], value_dim), jnp.float32),
            jax.ShapeDtypeStruct((tiles, heads, q_tokens), jnp.float32),
            jax.ShapeDtypeStruct((tiles, heads, q_tokens), jnp.float32),
        ],
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        interpret=interpret,
    )
    return Attended(o, m.swapaxes(1, 2), l.swapaxes(1, 2))
