"""KIVI (arXiv:2402.02750): packed pages, keys per channel and values per token, dequantized where they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layouts.packed import PackedLayout
from pallas_kernels.layouts.packed_kernel import KiviPages, PackedRefs, parts


@dataclass(frozen=True)
class Kivi(PackedLayout):
    """Codes of 2 or 4 bits; the reference dequantizes the pages of one step of the walk, the kernel folds scales into q
    and p and converts codes in registers.

    Bytes per page and KV head at 64 tokens, head_dim 128, 2 bits: 5,120 (15.6 % of bfloat16).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits == 8:
            raise ValueError("KIVI has 2 or 4 bits; for 8 bits choose a format with a scale per token.")

    def prepare(self, q: jax.Array) -> jax.Array:
        return q

    def fetch(self, pool: dict[str, jax.Array], layer: int | jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.decode(self.gather(pool, layer, ids))

    def scores(self, q: jax.Array, page: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.einsum("rhmd,rhsd->rhms", q, page[0], preferred_element_type=jnp.float32)

    def mix(self, p: jax.Array, page: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.einsum("rhms,rhsd->rhmd", p, page[1], preferred_element_type=jnp.float32)

    def dot_dtype(self, pool: Any, q: jax.Array) -> jnp.dtype:
        return jnp.dtype(jnp.bfloat16)

    def parts(self, pool: dict[str, jax.Array]) -> tuple[int, int]:
        return parts(self, pool)

    def in_kernel(self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, *, interpret: bool) -> KiviPages:
        return KiviPages(PackedRefs.of(self, refs, layer, head, interpret))
