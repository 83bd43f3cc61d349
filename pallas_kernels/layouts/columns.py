"""The layout of dense pages for the reference walk on CPUs: keys as columns, pages in flat rows.

Measured on two cores, 16 rows x 2 pages x 2 heads of 64: q K^T takes 47 us with keys as rows and 16 us with keys as
columns, a gather of pages 50 us from the six-dimensional pool and 16 to 25 us from flat rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.layouts.layout import PageShape

Pool = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class ColumnProducts:
    """The products of the reference walk on float32 keys as columns and values as rows."""

    def prepare(self, q: jax.Array) -> jax.Array:
        return q

    def scores(self, q: jax.Array, page: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.einsum("rhmd,rhds->rhms", q, page[0], preferred_element_type=jnp.float32)

    def mix(self, p: jax.Array, page: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.einsum("rhms,rhsd->rhmd", p, page[1], preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class ColumnFloats(ColumnProducts):
    """How floats are held where there are no kernels.

    bfloat16 is held as uint16: XLA has no bfloat16 gather or scatter on CPUs, and would convert the whole pool to
    float32 and back around each.
    """

    dtype: Any = jnp.float32
    """Of keys and values."""

    @property
    def stored(self) -> jnp.dtype:
        """Dtype of the arrays."""
        return jnp.dtype(jnp.uint16) if self.dtype == jnp.bfloat16 else jnp.dtype(self.dtype)

    def _fetch(self, array: jax.Array, layer: int | jax.Array, ids: jax.Array) -> jax.Array:
        _, layers, kv_heads, *page = array.shape
        rows = ((ids * layers + layer) * kv_heads)[:, None] + jnp.arange(kv_heads)
        x = array.reshape(-1, page[0] * page[1]).at[rows.reshape(-1)].get(mode="clip")
        return self._unpack(x).reshape(len(ids), kv_heads, *page)

    def _pack(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        return lax.bitcast_convert_type(x, jnp.uint16) if self.stored != self.dtype else x

    def _unpack(self, x: jax.Array) -> jax.Array:
        if self.stored == self.dtype:
            return x.astype(jnp.float32)
        return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)


@dataclass(frozen=True)
class Columns(ColumnFloats):
    """Floats in two arrays: keys [pages, layers, kv_heads, head_dim, page_tokens] and values [pages, layers, kv_heads,
    page_tokens, head_dim]. Two, because a write through two views of one array makes XLA copy it.
    """

    def pool(self, pages: int, layers: int, kv_heads: int, page_tokens: int, head_dim: int) -> Any:
        k, v = (head_dim, page_tokens), (page_tokens, head_dim)
        return tuple(jax.ShapeDtypeStruct((pages, layers, kv_heads, *shape), self.stored) for shape in (k, v))

    def heads_axis(self) -> Any:
        return (2, 2)

    def put_tokens(
        self, pool: Pool, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, places: jax.Array
    ) -> Pool:
        keys, values = pool
        keys = keys.at[pages, layer, :, :, places].set(self._pack(k), mode="drop", unique_indices=True)
        values = values.at[pages, layer, :, places].set(self._pack(v), mode="drop", unique_indices=True)
        return keys, values

    def put_pages(
        self, pool: Pool, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, inside: jax.Array
    ) -> Pool:
        keys, values = pool
        new_k = jnp.where(inside[:, None, None], self._pack(k).swapaxes(2, 3), keys.at[pages, layer].get(mode="clip"))
        new_v = jnp.where(inside[:, None, :, None], self._pack(v), values.at[pages, layer].get(mode="clip"))
        keys = keys.at[pages, layer].set(new_k, mode="drop", unique_indices=True)
        values = values.at[pages, layer].set(new_v, mode="drop", unique_indices=True)
        return keys, values

    def get_pages(self, pool: Pool, layer: int | jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, v = (array.at[pages, layer].get(mode="clip") for array in pool)
        if self.stored != self.dtype:
            k, v = (lax.bitcast_convert_type(x, self.dtype) for x in (k, v))
        return k.swapaxes(2, 3), v

    def pool_of(self, k: jax.Array, v: jax.Array) -> Pool:
        return self._pack(k).swapaxes(2, 3)[:, None], self._pack(v)[:, None]

    def page_shape(self, pool: Pool) -> PageShape:
        pages, _, kv_heads, page_tokens, head_dim = pool[1].shape
        return PageShape(pages, kv_heads, page_tokens, head_dim, head_dim)

    def fetch(self, pool: Pool, layer: int | jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [rows, kv_heads, head_dim, page_tokens] and values [rows, kv_heads, page_tokens, head_dim], float32."""
        k, v = (self._fetch(array, layer, ids) for array in pool)
        return k, v
