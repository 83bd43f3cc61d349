"""One layer's attention in a step: write the new KV, attend, for both sections. Knows no format and no model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.kv.format import AttentionSpec
from jaxserve.kv.meta import StepMeta
from jaxserve.kv.state import KVState
from jaxserve.types import PAGE_TOKENS
from pallas_kernels.merge import normalize


def attend_layer(
    kv: KVState,
    group: int,
    layer: int | jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    meta: StepMeta,
    spec: AttentionSpec,
) -> tuple[KVState, jax.Array]:
    """Writes k, v and attends with q: all flat [tokens, heads, head_dim], decode rows first, then tiles.

    `layer` is the index within `group`. Returns the new state and the output [tokens, heads, head_dim] in q's dtype;
    padding rows and tiles get zeros.
    """
    fmt = kv.formats[group]
    pool = kv.pools[group]
    tile_tokens = meta.tiles[group].counts.shape[0] * PAGE_TOKENS if meta.tiles else 0
    split = q.shape[0] - tile_tokens
    if split < 0 or (split > 0) != bool(meta.decode):
        raise ValueError(f"attend_layer: {q.shape[0]} tokens do not fit a step with {tile_tokens} tile tokens.")

    if meta.decode:
        rows = meta.decode[group]
        count = rows.counts.shape[0]
        pool = fmt.write_rows(pool, layer, _rows(k[:split], count), _rows(v[:split], count), rows)
    if meta.tiles:
        tiles = meta.tiles[group]
        count = tiles.counts.shape[0]
        pool = fmt.write_tiles(pool, layer, _rows(k[split:], count), _rows(v[split:], count), tiles)

    parts = []
    if meta.decode:
        part = fmt.attend_rows(
            _rows(q[:split], meta.decode[group].counts.shape[0]), pool, layer, meta.decode[group], spec
        )
        parts.append(normalize(part).reshape(split, *q.shape[1:]))
    if meta.tiles:
        part = fmt.attend_tiles(_rows(q[split:], count), pool, layer, meta.tiles[group], spec)
        parts.append(normalize(part).reshape(tile_tokens, *q.shape[1:]))
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return kv.with_pool(group, pool), out.astype(q.dtype)


def _rows(x: jax.Array, rows: int) -> jax.Array:
    """[rows * q_tokens, heads, head_dim] -> [rows, q_tokens, heads, head_dim]."""
    return x.reshape(rows, -1, *x.shape[1:])
