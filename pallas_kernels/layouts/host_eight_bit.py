"""8-bit pages for the kernels of CPUs: rows like those of GPUs, in types that XLA can scatter on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layouts.eight_bit import EightBitRows, Page
from pallas_kernels.layouts.packing import from_bits, to_bits


@dataclass(frozen=True)
class HostEightBitRows(EightBitRows):
    """`EightBitRows`, with the bits of codes and sides held as integers, see `host_dense` for why."""

    def pool(self, pages: int, layers: int, kv_heads: int, page_tokens: int, head_dim: int) -> Any:
        dtypes = {"codes": self.code.bits_dtype, "sides": jnp.uint16}
        shapes = super().pool(pages, layers, kv_heads, page_tokens, head_dim)
        return {name: jax.ShapeDtypeStruct(one.shape, dtypes[name]) for name, one in shapes.items()}

    def encode(
        self, k: jax.Array, v: jax.Array, layer: int | jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        keys, values, sides = super().encode(k, v, layer)
        return self.code.to_bits(keys), self.code.to_bits(values), tuple(map(to_bits, sides))

    def fetch(self, pool: Any, layer: int | jax.Array, ids: jax.Array) -> Page:
        def at(array: jax.Array, *index: Any) -> jax.Array:
            return array.at[(ids, layer, *index)].get(mode="promise_in_bounds")

        keys, values = (self.code.from_bits(at(pool["codes"], side)) for side in (0, 1))
        return Page(keys.swapaxes(2, 3), values, from_bits(at(pool["sides"])))
