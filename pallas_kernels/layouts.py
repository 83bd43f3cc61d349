"""How the bytes of a page become keys and values. Knows nothing of sequences, tables or masks.

A layout is all that the page walks need to know of a KV format. For the reference walk `fetch` reads some pages of one
layer, and `scores` and `mix` are the two products of attention on what was fetched; a layout that dequantizes does so
in `fetch`, a few pages at a time, one that computes on codes does so in the products. For the Triton walk `load_keys`
and `load_values` read one page of one head inside a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Layout(Protocol):
    """`ids` int32 [rows]; `q` float32 [rows, kv_heads, m, head_dim] with `m` query vectors that share a KV
    head; `p` float32 [rows, kv_heads, m, page_tokens]."""

    def page_shape(self, pool: Any) -> tuple[int, int, int, int]:
        """(pages, kv_heads, page_tokens, head_dim) of `pool`."""
        ...

    def fetch(self, pool: Any, layer: int | jax.Array, ids: jax.Array) -> Any:
        """What `scores` and `mix` need of the pages `ids` of `layer`. Ids are in range."""
        ...

    def scores(self, q: jax.Array, page: Any) -> jax.Array:
        """q K^T, float32 [rows, kv_heads, m, page_tokens]."""
        ...

    def mix(self, p: jax.Array, page: Any) -> jax.Array:
        """p V, float32 [rows, kv_heads, m, head_dim]."""
        ...

    def arrays(self, pool: Any) -> tuple[jax.Array, ...]:
        """The arrays of `pool` that a kernel takes."""
        ...

    def dot_dtype(self, pool: Any) -> jnp.dtype:
        """Dtype of the operands of a kernel's products."""
        ...

    def load_keys(self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, page: jax.Array) -> jax.Array:
        """In a kernel: keys of one page and KV head, [page_tokens, head_dim]. `refs`: of `arrays`, whole."""
        ...

    def load_values(self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, page: jax.Array) -> jax.Array:
        """In a kernel: values of one page and KV head, [page_tokens, head_dim]."""
        ...


@dataclass(frozen=True)
class Dense:
    """Keys and values as floats: one pool [pages, layers, 2, kv_heads, page_tokens, head_dim], K at 0 and V at 1."""

    def page_shape(self, pool: jax.Array) -> tuple[int, int, int, int]:
        pages, _, _, kv_heads, page_tokens, head_dim = pool.shape
        return pages, kv_heads, page_tokens, head_dim

    def fetch(self, pool: jax.Array, layer: int | jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        # K and V by two gathers: one gather of both costs a copy to take it apart again.
        k = pool.at[ids, layer, 0].get(mode="promise_in_bounds")
        v = pool.at[ids, layer, 1].get(mode="promise_in_bounds")
        return k, v

    def scores(self, q: jax.Array, page: tuple[jax.Array, jax.Array]) -> jax.Array:
        k = page[0].astype(jnp.float32)
        return jnp.einsum("rhmd,rhsd->rhms", q, k, preferred_element_type=jnp.float32)

    def mix(self, p: jax.Array, page: tuple[jax.Array, jax.Array]) -> jax.Array:
        v = page[1].astype(jnp.float32)
        return jnp.einsum("rhms,rhsd->rhmd", p, v, preferred_element_type=jnp.float32)

    def arrays(self, pool: jax.Array) -> tuple[jax.Array, ...]:
        return (pool,)

    def dot_dtype(self, pool: jax.Array) -> jnp.dtype:
        return pool.dtype

    def load_keys(self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, page: jax.Array) -> jax.Array:
        return refs[0][page, layer, 0, head]

    def load_values(self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, page: jax.Array) -> jax.Array:
        return refs[0][page, layer, 1, head]
