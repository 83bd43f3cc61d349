"""Dense pages for the kernels of CPUs: rows like those of GPUs, in types that XLA can scatter on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.layouts.dense import Dense


@dataclass(frozen=True)
class HostDense(Dense):
    """`Dense`, with bfloat16 held as uint16: XLA has no bfloat16 gather or scatter on CPUs, and would convert the whole
    pool to float32 and back around each."""

    def pool(self, pages: int, layers: int, kv_heads: int, page_tokens: int, head_dim: int) -> Any:
        stored = jnp.uint16 if self._as_bits else self.dtype
        return Dense(stored).pool(pages, layers, kv_heads, page_tokens, head_dim)

    def put_tokens(
        self, pool: jax.Array, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, places: jax.Array
    ) -> jax.Array:
        return super().put_tokens(pool, layer, self._pack(k), self._pack(v), pages, places)

    def put_pages(
        self, pool: jax.Array, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, inside: jax.Array
    ) -> jax.Array:
        return super().put_pages(pool, layer, self._pack(k), self._pack(v), pages, inside)

    def get_pages(self, pool: jax.Array, layer: int | jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, v = super().get_pages(pool, layer, pages)
        return self._unpack(k), self._unpack(v)

    def pool_of(self, k: jax.Array, v: jax.Array) -> jax.Array:
        return super().pool_of(self._pack(k), self._pack(v))

    def fetch(self, pool: jax.Array, layer: int | jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, v = super().fetch(pool, layer, ids)
        return self._unpack(k), self._unpack(v)

    @property
    def _as_bits(self) -> bool:
        return bool(self.dtype == jnp.bfloat16)

    def _pack(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        return lax.bitcast_convert_type(x, jnp.uint16) if self._as_bits else x

    def _unpack(self, x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, jnp.bfloat16) if self._as_bits else x
