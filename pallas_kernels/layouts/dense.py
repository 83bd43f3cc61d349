"""The layout of dense pages: floats as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compat import dot
from pallas_kernels.layouts.layout import PageShape


@dataclass(frozen=True)
class Dense:
    """Keys and values as floats: one pool [pages, layers, 2, kv_heads, page_tokens, head_dim], K at 0 and V at 1."""

    dtype: Any = jnp.float32
    """Of what `pool` makes; everything else takes it from the pool that it gets."""

    def pool(self, pages: int, layers: int, kv_heads: int, page_tokens: int, head_dim: int) -> Any:
        return jax.ShapeDtypeStruct((pages, layers, 2, kv_heads, page_tokens, head_dim), self.dtype)

    def heads_axis(self) -> Any:
        return 3

    def put_tokens(
        self, pool: jax.Array, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, places: jax.Array
    ) -> jax.Array:
        kv = jnp.stack([k, v], axis=1).astype(pool.dtype)
        return pool.at[pages, layer, :, :, places].set(kv, mode="drop", unique_indices=True)

    def put_pages(
        self, pool: jax.Array, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, inside: jax.Array
    ) -> jax.Array:
        old = pool.at[pages, layer].get(mode="clip")
        new = jnp.where(inside[:, None, None, :, None], jnp.stack([k, v], axis=1).astype(pool.dtype), old)
        return pool.at[pages, layer].set(new, mode="drop", unique_indices=True)

    def get_pages(self, pool: jax.Array, layer: int | jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        kv = pool.at[pages, layer].get(mode="clip")
        return kv[:, 0], kv[:, 1]

    def pool_of(self, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.stack([k, v], axis=1)[:, None]

    def page_shape(self, pool: jax.Array) -> PageShape:
        pages, _, _, kv_heads, page_tokens, head_dim = pool.shape
        return PageShape(pages, kv_heads, page_tokens, head_dim, head_dim)

    def prepare(self, q: jax.Array) -> jax.Array:
        return q

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

    def dot_dtype(self, pool: jax.Array, q: jax.Array) -> jnp.dtype:
        return pool.dtype

    def parts(self, pool: jax.Array) -> tuple[int, int]:
        return 1, 1

    def in_kernel(self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, *, interpret: bool) -> DensePages:
        return DensePages(refs[0], layer, head)


@dataclass(frozen=True)
class DensePages:
    """See `layout.KernelPages`."""

    pool: Any
    layer: jax.Array
    head: jax.Array

    def prepare(self, q: tuple[jax.Array, ...]) -> jax.Array:
        return q[0]

    def scores(self, q: jax.Array, page: jax.Array) -> jax.Array:
        return dot(q, self.pool[page, self.layer, 0, self.head].T)

    def mix(self, p: jax.Array, page: jax.Array) -> tuple[jax.Array, ...]:
        v = self.pool[page, self.layer, 1, self.head]
        return (dot(p.astype(v.dtype), v),)
