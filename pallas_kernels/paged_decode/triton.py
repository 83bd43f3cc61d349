"""Paged decode attention as a Pallas kernel (Triton lowering): one program per row, KV head and share of the pages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.compat import triton_call
from pallas_kernels.layouts import KernelLayout
from pallas_kernels.merge import Attended, merge
from pallas_kernels.triton_walk import load_parts, page_range, store, triton_walk
from pallas_kernels.tuning import Launch, decode_launch, decode_splits

MIN_DOT = 16
"""Smallest dimension of a dot: the query vectors that share a KV head are padded to it."""


def paged_decode(
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
    splits: int | None = None,
    launch: Launch | None = None,
    interpret: bool = False,
) -> Attended:
    """See `api.paged_decode`. The bits of a row depend on its own data and on `splits`; that and `launch`, with all
    vectors in its block, are for tuning."""
    rows, q_tokens, heads, head_dim = q.shape
    pages, kv_heads, page_tokens, _, value_dim = layout.page_shape(pool)
    group = heads // kv_heads
    m_rows = max(MIN_DOT, pl.next_power_of_2(group * q_tokens))
    splits = splits or min(decode_splits(rows, kv_heads), tables.shape[1])
    launch = launch or decode_launch(m_rows)
    arrays = layout.arrays(pool)
    q_parts, o_parts = layout.parts(pool)
    lists = () if places is None else (places,)

    grouped = q.reshape(rows, q_tokens, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(rows, kv_heads, group * q_tokens, head_dim).astype(layout.dot_dtype(pool, q))
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, m_rows - group * q_tokens), (0, 0)))

    def kernel(layer_ref, positions_ref, counts_ref, table_ref, q_ref, *refs):
        place_refs, array_refs, out_refs = refs[: len(lists)], refs[len(lists) : -3], refs[-3:]
        row, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        position, count, layer = positions_ref[row], counts_ref[row], layer_ref[0]
        first, end = page_range(position, count, window, page_tokens, tables.shape[1])
        if place_refs:
            # Typed: the Triton lowering of jax 0.10 takes where(c, 2, 0) for a bool.
            first, end = jnp.int32(0), jnp.where(position >= 0, jnp.int32(tables.shape[1]), jnp.int32(0))
        share = pl.cdiv(jnp.maximum(end - first, 0), splits)
        begin = first + split * share
        token = jnp.arange(m_rows) % q_tokens
        part = triton_walk(
            load_parts(q_ref, q_parts),
            jnp.where((token < count) & (position >= 0), position + token, -1),
            begin,
            jnp.minimum(begin + share, end),
            lambda index: table_ref[row, index],
            lambda index: place_refs[0][row, index] if place_refs else index,
            layout.in_kernel(array_refs, layer, head, interpret=interpret),
            o_parts=o_parts,
            value_dim=value_dim,
            pages=pages,
            page_tokens=page_tokens,
            scale=scale,
            window=window,
            softcap=softcap,
        )
        store(part, *out_refs)

    outer = (rows, kv_heads, splits, m_rows)
    per_program = pl.BlockSpec((None, None, None, m_rows), lambda r, h, s: (r, h, s, 0))
    o, m, l = triton_call(  # noqa: E741
        kernel,
        jnp.asarray(layer, jnp.int32).reshape(1),
        positions,
        counts,
        tables,
        grouped,
        *lists,
        *arrays,
        name="paged_decode",
        grid=(rows, kv_heads, splits),
        in_specs=[None] * 4
        + [pl.BlockSpec((None, None, m_rows, head_dim), lambda r, h, s: (r, h, 0, 0))]
        + [None] * (len(lists) + len(arrays)),
        out_specs=[
            pl.BlockSpec((None, None, None, m_rows, value_dim), lambda r, h, s: (r, h, s, 0, 0)),
            per_program,
            per_program,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*outer, value_dim), jnp.float32),
            jax.ShapeDtypeStruct(outer, jnp.float32),
            jax.ShapeDtypeStruct(outer, jnp.float32),
        ],
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        interpret=interpret,
    )
    part = merge([Attended(o[:, :, s], m[:, :, s], l[:, :, s]) for s in range(splits)])
    return jax.tree.map(lambda x: ungroup(x, group, q_tokens), part)


def ungroup(x: jax.Array, group: int, q_tokens: int) -> jax.Array:
    """[rows, kv_heads, m_rows, ...] -> [rows, q_tokens, heads, ...]."""
    rows, kv_heads = x.shape[:2]
    x = x[:, :, : group * q_tokens].reshape(rows, kv_heads, group, q_tokens, *x.shape[3:])
    return jnp.moveaxis(x, 3, 1).reshape(rows, q_tokens, kv_heads * group, *x.shape[4:])
