"""One layer's attention in a step: write the new KV, attend, for both sections. Knows no format and no model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.kv.format import AttentionSpec, Layer
from jaxserve.kv.meta import Rows, StepMeta
from jaxserve.kv.state import KVState
from pallas_kernels.merge import normalize


def attend_layer(
    kv: KVState,
    group: int,
    layer: Layer,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    meta: StepMeta,
    spec: AttentionSpec,
    readers: StepMeta | None = None,
) -> tuple[KVState, jax.Array]:
    """Writes k, v and attends with q: all flat [tokens, heads, head_dim], decode rows first, then tiles.

    `layer` is the index within `group`. `meta` says what is written, `readers` what attends: all of it, or fewer tiles.
    Returns the new state and the output [tokens, heads, head_dim] in q's dtype; padding rows and tiles get
    zeros.
    """
    fmt = kv.formats[group]
    pool = kv.pools[group]
    tile_tokens = meta.tiles[group].counts.shape[0] * meta.tiles[group].page_tokens if meta.tiles else 0
    split = q.shape[0] - tile_tokens
    if split < 0 or (split > 0) != bool(meta.decode):
        raise ValueError(f"attend_layer: {q.shape[0]} tokens do not fit a step with {tile_tokens} tile tokens.")

    readers = readers or meta
    rows = meta.decode[group] if meta.decode else None
    tiles = meta.tiles[group] if meta.tiles else None
    # Every write before any read: a read between two writes would make XLA copy the pool.
    if rows:
        row_q, row_k, row_v = (_by_row(x[:split], rows) for x in (q, k, v))
        pool = fmt.write_rows(pool, layer, row_k, row_v, rows)
    if tiles:
        tile_q, tile_k, tile_v = (_by_row(x[split:], tiles) for x in (q, k, v))
        pool = fmt.write_tiles(pool, layer, tile_k, tile_v, tiles)
    parts = []
    if rows:
        parts.append(fmt.attend_rows(row_q, pool, layer, readers.decode[group], spec))
    if tiles:
        parts.append(fmt.attend_tiles(tile_q, tile_k, tile_v, pool, layer, readers.tiles[group], spec))
    out = [normalize(part).reshape(-1, *q.shape[1:]) for part in parts]
    return kv.with_pool(group, pool), jnp.concatenate(out).astype(q.dtype)


def _by_row(x: jax.Array, rows: Rows) -> jax.Array:
    """[rows * q_tokens, heads, head_dim] -> [rows, q_tokens, heads, head_dim]."""
    return x.reshape(rows.counts.shape[0], -1, *x.shape[1:])
