"""Which drafts of a verification row stand. Pure arrays; knows nothing of slots or proposers.

A deterministic draft x is verified by drawing the token of its position as plain decoding would, with the same random
bits: the draft stands if that token is x, otherwise the token is the correction. This is rejection sampling against a
point mass: x is accepted with probability p(x), and a token drawn given that it is not x is distributed as p without x,
renormalized. Sharing the bits makes more of it than a separate acceptance draw would: a sequence has the same tokens
with and without speculation, so they do not depend on which drafts happened to be there after a preemption.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxserve.types import PAGE_TOKENS


def appended(tokens: Array, drafts: Array, drafted: Array) -> Array:
    """int32 [R]: how many of the row's tokens stand: the accepted drafts and the token after them.

    tokens: int32 [R, q] drawn at each position; drafts: int32 [R, q - 1]; drafted: int32 [R], real drafts of the row.
    """
    index = jnp.arange(drafts.shape[1], dtype=jnp.int32)
    hit = (tokens[:, :-1] == drafts) & (index < drafted[:, None])
    return 1 + jnp.sum(jnp.cumprod(hit.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def room(length: Array, limit: Array, page_tokens: int = PAGE_TOKENS) -> Array:
    """int32 [R]: the most drafts that a sequence of `length` known tokens may verify next.

    The row covers positions length - 1 .. length - 1 + drafts, which lie in one page, so that a rejected draft never
    costs a page; and drafts plus the token after them end at `limit` known tokens at most.
    """
    page_left = page_tokens - 1 - jnp.maximum(length - 1, 0) % page_tokens
    return jnp.maximum(jnp.minimum(page_left, limit - length - 1), 0)
