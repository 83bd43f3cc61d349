"""Dense KV: keys and values as the floats they are. One page class, written at once, read as written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxserve.kv.format import AttentionSpec, KVFormat, Layer, PageKind, formats
from jaxserve.kv.meta import ABSENT, Rows
from jaxserve.types import PAGE_TOKENS, KVGroup
from pallas_kernels.layouts import Dense
from pallas_kernels.merge import Attended
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill


@dataclass(frozen=True)
class DenseFormat(KVFormat):
    """A pool [pages, layers, 2, kv_heads, page_tokens, head_dim] of `dtype`, keys at 0 and values at 1."""

    backend: str | None = None
    """Of the attention ops, see `pallas_kernels.backends`; None takes the platform's."""

    dtype: ClassVar[jnp.dtype]

    def payload(self, group: KVGroup, pages: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        shape = (pages[0], len(group.layers), 2, group.kv_heads, PAGE_TOKENS, group.head_dim)
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def kinds(self, group: KVGroup) -> tuple[PageKind, ...]:
        one = self.payload(group, (1,))
        return (PageKind("dense", math.prod(one.shape) * one.dtype.itemsize),)

    def pages_held(self, pages: int) -> tuple[int, ...]:
        return (pages,)

    def heads_axis(self, group: KVGroup) -> int:
        return 3

    def write_rows(self, pool: jax.Array, layer: Layer, k: jax.Array, v: jax.Array, rows: Rows) -> jax.Array:
        count, q_tokens = k.shape[:2]
        token = jnp.arange(q_tokens)
        pages = jnp.where(token < rows.counts[:, None], rows.pages[:, None], ABSENT).reshape(-1)
        offsets = (rows.offsets[:, None] + token).reshape(-1)
        kv = self._finite(jnp.stack([k, v], axis=2)).reshape(count * q_tokens, 2, *k.shape[2:])
        return pool.at[pages, layer, :, :, offsets].set(kv, mode="drop", unique_indices=True)

    def write_tiles(self, pool: jax.Array, layer: Layer, k: jax.Array, v: jax.Array, tiles: Rows) -> jax.Array:
        # Whole pages: a scatter of tokens is a loop over tokens on CPUs. The tile's token i belongs at offset + i.
        place = jnp.arange(PAGE_TOKENS) - tiles.offsets[:, None]
        inside = (place >= 0) & (place < tiles.counts[:, None])
        kv = self._finite(jnp.stack([k, v], axis=1)).swapaxes(2, 3)
        source = jnp.clip(place, 0, PAGE_TOKENS - 1)[:, None, None, :, None]
        moved = jnp.take_along_axis(kv, source, axis=3)
        old = pool.at[tiles.pages, layer].get(mode="clip")
        new = jnp.where(inside[:, None, None, :, None], moved, old)
        return pool.at[tiles.pages, layer].set(new, mode="drop", unique_indices=True)

    def attend_rows(self, q: jax.Array, pool: jax.Array, layer: Layer, rows: Rows, spec: AttentionSpec) -> Attended:
        return self._attend(paged_decode, q, pool, layer, rows, spec)

    def attend_tiles(self, q: jax.Array, pool: jax.Array, layer: Layer, tiles: Rows, spec: AttentionSpec) -> Attended:
        return self._attend(paged_prefill, q, pool, layer, tiles, spec)

    def _attend(self, op, q, pool, layer, rows, spec) -> Attended:
        return op(
            q,
            rows.positions,
            pool,
            layer,
            rows.tables[0],
            counts=rows.counts,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            layout=Dense(),
            backend=self.backend,
        )

    def _finite(self, x: jax.Array) -> jax.Array:
        # The pool's invariant: another row's masked read of this page computes 0 * value.
        return jnp.nan_to_num(x.astype(self.dtype), nan=0.0)


@formats.register("bf16")
@dataclass(frozen=True)
class BF16(DenseFormat):
    """Dense KV in bfloat16."""

    dtype = jnp.dtype(jnp.bfloat16)


@formats.register("f32")
@dataclass(frozen=True)
class F32(DenseFormat):
    """Dense KV in float32."""

    dtype = jnp.dtype(jnp.float32)
