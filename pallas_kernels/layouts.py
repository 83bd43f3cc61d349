"""How the bytes of a page become keys and values. Knows nothing of sequences, tables or masks.

A layout is all that the page walks of the reference ops need to know of a KV format: `fetch` reads some pages of one
layer, `scores` and `mix` are the two products of attention on what was fetched. A layout that dequantizes does so in
`fetch`, one page at a time; one that computes on codes does so in the products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Layout(Protocol):
    """Shapes: `ids` int32 [rows]; `q` float32 [rows, kv_heads, m, head_dim] with `m` query vectors that share a KV
    head; `p` float32 [rows, kv_heads, m, page_tokens]. A row's bits may depend on that row only."""

    def page_shape(self, pool: Any) -> tuple[int, int, int, int]:
        """(pages, kv_heads, page_tokens, head_dim) of `pool`."""
        ...

    def fetch(self, pool: Any, layer: int, ids: jax.Array) -> Any:
        """What `scores` and `mix` need of the pages `ids` of `layer`. Ids out of range give any finite content."""
        ...

    def scores(self, q: jax.Array, page: Any) -> jax.Array:
        """q K^T, float32 [rows, kv_heads, m, page_tokens]."""
        ...

    def mix(self, p: jax.Array, page: Any) -> jax.Array:
        """p V, float32 [rows, kv_heads, m, head_dim]."""
        ...


@dataclass(frozen=True)
class Dense:
    """Keys and values as floats: one pool [pages, layers, 2, kv_heads, page_tokens, head_dim], K at 0 and V at 1."""

    def page_shape(self, pool: jax.Array) -> tuple[int, int, int, int]:
        pages, _, _, kv_heads, page_tokens, head_dim = pool.shape
        return pages, kv_heads, page_tokens, head_dim

    def fetch(self, pool: jax.Array, layer: int, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        # K and V by two gathers: one gather of both costs a copy to take it apart again.
        k = pool.at[ids, layer, 0].get(mode="clip")
        v = pool.at[ids, layer, 1].get(mode="clip")
        return k, v

    def scores(self, q: jax.Array, page: tuple[jax.Array, jax.Array]) -> jax.Array:
        k = page[0].astype(jnp.float32)
        return jnp.einsum("rhmd,rhsd->rhms", q, k, preferred_element_type=jnp.float32)

    def mix(self, p: jax.Array, page: tuple[jax.Array, jax.Array]) -> jax.Array:
        v = page[1].astype(jnp.float32)
        return jnp.einsum("rhms,rhsd->rhmd", p, v, preferred_element_type=jnp.float32)
