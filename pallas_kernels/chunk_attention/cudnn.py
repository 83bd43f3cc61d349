"""Attention of chunks among themselves by cuDNN, all chunks of a step in one call.

What jax offers in public can neither pack sequences nor return the log of the sums as float32, so this is built on
what it keeps to itself (`jax._src.cudnn`), in jax 0.10.2 to 0.11. Chunks are cuDNN's packed sequences: where each
begins among the tokens, and how many it has.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from pallas_kernels.merge import NO_KEY, Attended

MOST_HEAD_DIM = 256


def missing() -> str | None:
    """Why this process cannot use it; None if it can."""
    try:
        fused.check_cudnn_version()
    except RuntimeError:
        return "cuDNN is not installed"
    if not fused.check_compute_capability("9.0"):
        return "packed sequences need a GPU of the Hopper generation or later"
    return None


def unfit(dtype: jnp.dtype, page_tokens: int, heads: int, kv_heads: int, head_dim: int) -> str | None:
    """Why it does not take such tiles; None if it does."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN has attention of 16-bit numbers, not of {dtype}"
    if head_dim % 8 or head_dim > MOST_HEAD_DIM:
        return f"cuDNN takes heads of up to {MOST_HEAD_DIM} channels, in multiples of 8, not of {head_dim}"
    if page_tokens * kv_heads % heads:
        return f"offsets of {kv_heads} KV heads cannot be told for {heads} heads"
    return None


def chunk_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, counts: jax.Array, *, scale: float
) -> Attended:
    """See `api.chunk_attention`. cuDNN normalizes outputs and rounds them to q's dtype: l is 1, m their sum's log."""
    tiles, page_tokens, heads, head_dim = q.shape
    tokens = tiles * page_tokens
    index = jnp.arange(tiles, dtype=jnp.int32)
    begins = first == index
    lengths = jnp.zeros(tiles, jnp.int32).at[jnp.where(first < 0, tiles, first)].add(counts, mode="drop")
    # Chunks first, in order; the others begin at the end and are empty.
    offsets = jnp.sort(jnp.append(jnp.where(begins, index * page_tokens, tokens), tokens)).astype(jnp.int32)
    packed = jnp.where(offsets[:-1] < tokens, lengths[jnp.minimum(offsets[:-1] // page_tokens, tiles - 1)], 0)
    # One sequence is not packed.
    packing = {"q_offsets": offsets[None], "kv_offsets": _kv_offsets(offsets, q, k)[None]} if tiles > 1 else {}
    packed = packed[None] if tiles > 1 else packed
    attend: Callable[..., tuple[jax.Array, jax.Array]] = fused.dot_product_attention
    o, log_sums = attend(
        *(x.reshape(1, tokens, -1, head_dim) for x in (q, k, v)),
        q_seqlen=packed,
        kv_seqlen=packed,
        scale=scale,
        mask_type=fused.MaskType.PADDING_CAUSAL,
        return_residual=True,
        **packing,
    )
    # [chunks, heads, tokens], a chunk's from its own first token on.
    chunk = jnp.repeat(jnp.cumsum(begins) - 1, page_tokens)
    inside = jnp.arange(tokens) - jnp.repeat(first, page_tokens) * page_tokens
    seen = (jnp.arange(page_tokens) < counts[:, None]) & (first >= 0)[:, None]
    m = log_sums[jnp.maximum(chunk, 0), :, jnp.clip(inside, 0, tokens - 1)].reshape(tiles, page_tokens, heads)
    o = o.reshape(q.shape).astype(jnp.float32)
    return Attended(
        jnp.where(seen[..., None, None], o, 0.0),
        jnp.where(seen[..., None], m, NO_KEY),
        jnp.broadcast_to(seen[..., None], m.shape).astype(jnp.float32),
    )


def _kv_offsets(offsets: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """`offsets`, in tokens, as this jax wants those of keys: until jax#39521 it multiplies them by the heads of the
    queries, so that cuDNN would read keys of other tokens where heads share them."""
    heads, kv_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
    with jax.ensure_compile_time_eval():
        shapes = (jax.ShapeDtypeStruct((1, 2, each, head_dim), q.dtype) for each in (heads, kv_heads))
        lengths, begins = jnp.ones((1, 2), jnp.int32), jnp.arange(3, dtype=jnp.int32)[None]
        *_, made = fused._fix_seqlen_offsets(lengths, lengths, begins, begins, *shapes)
        stride = int(made[0, 1])
    return offsets * (kv_heads * head_dim) // stride
