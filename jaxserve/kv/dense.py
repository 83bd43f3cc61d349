"""Dense KV: keys and values as the floats they are. One page class, written at once, read as written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxserve.kv.format import AttentionSpec, Layer, Pool, formats
from jaxserve.kv.meta import Rows
from jaxserve.kv.token_format import TokenFormat
from pallas_kernels.backends import resolve
from pallas_kernels.chunk_attention import chunk_attention, unfit
from pallas_kernels.layouts import TokenLayout, float_layout
from pallas_kernels.merge import Attended, merge


@dataclass(frozen=True)
class DenseFormat(TokenFormat):
    """Floats of `dtype`."""

    dtype: ClassVar[jnp.dtype]

    @property
    def layout(self) -> TokenLayout:
        return float_layout(self.dtype, self.backend)

    def attend_tiles(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pool: Pool, layer: Layer, tiles: Rows, spec: AttentionSpec
    ) -> Attended:
        """On cuDNN, what a chunk reads of itself does not come from its pages."""
        kv_heads, head_dim = k.shape[2:]
        whole = (
            spec.window is None
            and spec.softcap is None
            and not unfit(self.dtype, q.shape[1], q.shape[2], kv_heads, head_dim)
        )
        if resolve(self.backend) != "cudnn" or tiles.chunks is None or not whole:
            return super().attend_tiles(q, k, v, pool, layer, tiles, spec)
        chunks, (k, v) = tiles.chunks, self.storable(k, v)
        own = chunk_attention(
            q.astype(self.dtype), k, v, chunks.first, chunks.counts, scale=spec.scale, backend="cudnn"
        )
        return merge([super().attend_tiles(q, k, v, pool, layer, tiles.before_chunks(), spec), own])

    def storable(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The pool's invariant: another row's masked read of this page computes 0 * value.
        return jnp.nan_to_num(k.astype(self.dtype), nan=0.0), jnp.nan_to_num(v.astype(self.dtype), nan=0.0)


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
