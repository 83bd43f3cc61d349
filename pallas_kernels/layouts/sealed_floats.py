"""Layouts of sealed pages that hold floats: keys and values may differ in channels. Know nothing of why they do.

Dense pages have one width for both. Here either may have any multiple of 16 channels, so that a page holds as many as
its keys and its values need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.compat import dot
from pallas_kernels.layouts.columns import ColumnFloats, ColumnProducts
from pallas_kernels.layouts.layout import KernelPages, PageShape
from pallas_kernels.layouts.packing import from_bits, to_bits

STEP = 16
"""Channels come in multiples of the smallest dimension of a product on tensor cores."""


@dataclass(frozen=True)
class FloatRows(ColumnProducts):
    """For kernels: `k` [kv_heads, page_tokens, head_dim], `v` [kv_heads, page_tokens, value_dim]."""

    dtype: Any = jnp.bfloat16

    def shapes(
        self, kv_heads: int, page_tokens: int, head_dim: int, value_dim: int | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        dims = {"k": head_dim, "v": _checked(head_dim, value_dim)}
        dtype = jnp.dtype(self.dtype)
        return {name: jax.ShapeDtypeStruct((kv_heads, page_tokens, dim), dtype) for name, dim in dims.items()}

    def encode(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        return {"k": k.astype(self.dtype), "v": v.astype(self.dtype)}

    def page_shape(self, pool: dict[str, jax.Array]) -> PageShape:
        pages, _, kv_heads, page_tokens, head_dim = pool["k"].shape
        return PageShape(pages, kv_heads, page_tokens, head_dim, pool["v"].shape[-1])

    def fetch(self, pool: dict[str, jax.Array], layer: int | jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, v = (pool[name].at[ids, layer].get(mode="promise_in_bounds").astype(jnp.float32) for name in ("k", "v"))
        return k.swapaxes(2, 3), v

    def arrays(self, pool: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        return pool["k"], pool["v"]

    def dot_dtype(self, pool: dict[str, jax.Array], q: jax.Array) -> jnp.dtype:
        return pool["k"].dtype

    def parts(self, pool: dict[str, jax.Array]) -> tuple[int, int]:
        shape = self.page_shape(pool)
        return shape.head_dim // _power(shape.head_dim), shape.value_dim // _power(shape.value_dim)

    def in_kernel(self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, *, interpret: bool) -> KernelPages:
        k, v = refs
        return _Pages(k, v, layer, head)


@dataclass(frozen=True)
class _Pages:
    """See `layout.KernelPages`. Arrays in a kernel are a power of two wide: 48 channels are three products of 16."""

    k: Any
    v: Any
    layer: jax.Array
    head: jax.Array

    def prepare(self, q: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return q

    def scores(self, q: tuple[jax.Array, ...], page: jax.Array) -> jax.Array:
        products = [dot(part, block.T) for part, block in zip(q, self._blocks(self.k, page), strict=True)]
        return sum(products[1:], products[0])

    def mix(self, p: jax.Array, page: jax.Array) -> tuple[jax.Array, ...]:
        weights = p.astype(self.v.dtype)
        return tuple(dot(weights, block) for block in self._blocks(self.v, page))

    def _blocks(self, ref: Any, page: jax.Array) -> list[jax.Array]:
        """The channels of a page in arrays [page_tokens, width]."""
        dim = ref.shape[-1]
        width = _power(dim)
        starts = range(0, dim, width)
        return [ref[page, self.layer, self.head, :, pl.ds(start, width)] for start in starts]


@dataclass(frozen=True)
class HostFloatRows(FloatRows):
    """For the kernels of CPUs: `FloatRows`, with bfloat16 held as uint16, see `host_dense` for why."""

    def shapes(
        self, kv_heads: int, page_tokens: int, head_dim: int, value_dim: int | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        stored = jnp.dtype(jnp.uint16 if self._as_bits else self.dtype)
        shapes = super().shapes(kv_heads, page_tokens, head_dim, value_dim)
        return {name: jax.ShapeDtypeStruct(one.shape, stored) for name, one in shapes.items()}

    def encode(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        page = super().encode(k, v)
        return {name: to_bits(x) for name, x in page.items()} if self._as_bits else page

    def fetch(self, pool: dict[str, jax.Array], layer: int | jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, v = (pool[name].at[ids, layer].get(mode="promise_in_bounds") for name in ("k", "v"))
        k, v = (from_bits(x) if self._as_bits else x.astype(jnp.float32) for x in (k, v))
        return k.swapaxes(2, 3), v

    @property
    def _as_bits(self) -> bool:
        return bool(self.dtype == jnp.bfloat16)


@dataclass(frozen=True)
class FloatColumns(ColumnFloats):
    """For the reference walk on CPUs (see `columns` for why): `k` [kv_heads, head_dim, page_tokens], `v` [kv_heads,
    page_tokens, value_dim]."""

    dtype: Any = jnp.bfloat16

    def shapes(
        self, kv_heads: int, page_tokens: int, head_dim: int, value_dim: int | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        value_dim = _checked(head_dim, value_dim)
        return {
            "k": jax.ShapeDtypeStruct((kv_heads, head_dim, page_tokens), self.stored),
            "v": jax.ShapeDtypeStruct((kv_heads, page_tokens, value_dim), self.stored),
        }

    def encode(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        return {"k": self._pack(k.swapaxes(-1, -2)), "v": self._pack(v)}

    def page_shape(self, pool: dict[str, jax.Array]) -> PageShape:
        pages, _, kv_heads, page_tokens, value_dim = pool["v"].shape
        return PageShape(pages, kv_heads, page_tokens, pool["k"].shape[-2], value_dim)

    def fetch(self, pool: dict[str, jax.Array], layer: int | jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._fetch(pool["k"], layer, ids), self._fetch(pool["v"], layer, ids)


def _checked(head_dim: int, value_dim: int | None) -> int:
    """Channels of values. ValueError for widths that kernels cannot take."""
    value_dim = head_dim if value_dim is None else value_dim
    for dim in (head_dim, value_dim):
        if dim <= 0 or dim % STEP:
            raise ValueError(f"Sealed pages of floats need a head_dim that is a multiple of {STEP}, not {dim}.")
    return value_dim


def _power(dim: int) -> int:
    """The largest power of two that divides `dim`."""
    return dim & -dim
