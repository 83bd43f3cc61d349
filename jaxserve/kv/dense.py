"""Dense KV: keys and values as the floats they are. One page class, written at once, read as written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxserve.kv.format import AttentionSpec, KVFormat, Layer, PageKind, Pool, formats
from jaxserve.kv.meta import ABSENT, Rows
from jaxserve.types import PAGE_TOKENS, KVGroup
from pallas_kernels.backends import resolve
from pallas_kernels.layouts import Columns, Dense, TokenLayout
from pallas_kernels.merge import Attended
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill


@dataclass(frozen=True)
class DenseFormat(KVFormat):
    """Floats of `dtype`, in the layout that the backend which reads them wants."""

    backend: str | None = None
    """Of the attention ops, see `pallas_kernels.backends`; None takes the platform's."""

    dtype: ClassVar[jnp.dtype]

    @property
    def layout(self) -> TokenLayout:
        return Dense(self.dtype) if resolve(self.backend) == "triton" else Columns(self.dtype)

    def payload(self, group: KVGroup, pages: tuple[int, ...]) -> Any:
        return self.layout.pool(pages[0], len(group.layers), group.kv_heads, PAGE_TOKENS, group.head_dim)

    def kinds(self, group: KVGroup) -> tuple[PageKind, ...]:
        arrays = jax.tree.leaves(self.payload(group, (1,)))
        return (PageKind("dense", sum(x.size * x.dtype.itemsize for x in arrays)),)

    def pages_held(self, pages: int) -> tuple[int, ...]:
        return (pages,)

    def heads_axis(self, group: KVGroup) -> Any:
        return self.layout.heads_axis()

    def write_rows(self, pool: Pool, layer: Layer, k: jax.Array, v: jax.Array, rows: Rows) -> Pool:
        count, q_tokens, kv_heads, head_dim = k.shape
        token = jnp.arange(q_tokens)
        pages = jnp.where(token < rows.counts[:, None], rows.pages[:, None], ABSENT).reshape(-1)
        places = (rows.offsets[:, None] + token).reshape(-1)
        k, v = (self._finite(x).reshape(count * q_tokens, kv_heads, head_dim) for x in (k, v))
        return self.layout.put_tokens(pool, layer, k, v, pages, places)

    def write_tiles(self, pool: Pool, layer: Layer, k: jax.Array, v: jax.Array, tiles: Rows) -> Pool:
        # Whole pages: a scatter of tokens is a loop over tokens on CPUs. The tile's token i belongs at offset + i.
        place = jnp.arange(PAGE_TOKENS) - tiles.offsets[:, None]
        inside = (place >= 0) & (place < tiles.counts[:, None])
        source = jnp.clip(place, 0, PAGE_TOKENS - 1)[:, None, :, None]
        k, v = (jnp.take_along_axis(self._finite(x).swapaxes(1, 2), source, axis=2) for x in (k, v))
        return self.layout.put_pages(pool, layer, k, v, tiles.pages, inside)

    def attend_rows(self, q: jax.Array, pool: Pool, layer: Layer, rows: Rows, spec: AttentionSpec) -> Attended:
        return self._attend(paged_decode, q, pool, layer, rows, spec)

    def attend_tiles(self, q: jax.Array, pool: Pool, layer: Layer, tiles: Rows, spec: AttentionSpec) -> Attended:
        return self._attend(paged_prefill, q, pool, layer, tiles, spec)

    def _attend(self, op: Any, q: jax.Array, pool: Pool, layer: Layer, rows: Rows, spec: AttentionSpec) -> Attended:
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
            layout=self.layout,
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


@formats.register("f16")
@dataclass(frozen=True)
class F16(DenseFormat):
    """Dense KV in float16: closer than bfloat16, and clipped at 65504."""

    dtype = jnp.dtype(jnp.float16)


@formats.register("f32")
@dataclass(frozen=True)
class F32(DenseFormat):
    """Dense KV in float32."""

    dtype = jnp.dtype(jnp.float32)
