"""Attention of chunks among themselves in jnp: the definition. Scores of all tokens with all others, so for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.merge import NO_KEY, Attended


def chunk_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, counts: jax.Array, *, scale: float
) -> Attended:
    """See `api.chunk_attention`."""
    tiles, page_tokens, heads, head_dim = q.shape
    kv_heads, tokens = k.shape[2], tiles * page_tokens
    grouped = q.astype(jnp.float32).reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    k, v = (x.astype(jnp.float32).reshape(tokens, kv_heads, head_dim) for x in (k, v))
    chunk = jnp.repeat(first, page_tokens)
    real = (jnp.arange(page_tokens) < counts[:, None]).reshape(-1) & (chunk >= 0)
    seen = (chunk[:, None] == chunk) & real[:, None] & real & jnp.tri(tokens, dtype=bool)
    s = jnp.where(seen[:, None, None], scale * jnp.einsum("tkgd,skd->tkgs", grouped, k), NO_KEY)
    m = jnp.max(s, axis=-1)
    p = jnp.where(seen[:, None, None], jnp.exp(s - m[..., None]), 0.0)
    part = Attended(jnp.einsum("tkgs,skd->tkgd", p, v), m, jnp.sum(p, axis=-1))
    return jax.tree.map(lambda x: x.reshape(tiles, page_tokens, heads, *x.shape[3:]), part)
