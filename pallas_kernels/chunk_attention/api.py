"""Attention of the tokens of prefill chunks among themselves, from activations. Knows no page and no earlier token.

The other part of a prefill is what its chunks read of the pages before them (`paged_prefill`); the two merge
(`pallas_kernels.merge`). That is worth a second part because dense attention of whole chunks is what vendors' libraries
are fastest at.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from pallas_kernels.chunk_attention import cudnn, reference
from pallas_kernels.merge import Attended

_OPS: dict[str, Callable[..., Attended]] = {
    "reference": reference.chunk_attention,
    "cudnn": cudnn.chunk_attention,
}


def chunk_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    counts: jax.Array,
    *,
    scale: float,
    backend: str,
) -> Attended:
    """Causal attention of each chunk over its own tokens.

    q: [tiles, page_tokens, heads, head_dim]; k, v: [tiles, page_tokens, kv_heads, head_dim], of q's dtype and
        finite, also where they are padding. A chunk is consecutive tiles, all but the last of them full.
    first: int32 [tiles], the tile with which the chunk of each tile begins; -1: the tile is of no chunk and sees
        nothing.
    counts: int32 [tiles]; queries from counts[tile] on see nothing, and their keys and values are not seen.
    backend: `reference` (jnp, every token with every other: for tests) or `cudnn` (bfloat16 or float16 on Hopper and
        later; see `cudnn.unfit` for the sizes).

    Returns (o, m, l), float32 [tiles, page_tokens, heads(, head_dim)], see `pallas_kernels.merge`. Raises ValueError
    for shapes that do not fit together.
    """
    tiles, page_tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if k.shape != v.shape or k.shape != (tiles, page_tokens, kv_heads, head_dim) or heads % kv_heads:
        raise ValueError(f"chunk_attention: keys {k.shape} and values {v.shape} do not fit queries {q.shape}.")
    if first.shape != (tiles,) or counts.shape != (tiles,):
        raise ValueError(f"chunk_attention: first and counts must be [{tiles}], not {first.shape} and {counts.shape}.")
    return _OPS[backend](q, k, v, first, counts, scale=scale)
