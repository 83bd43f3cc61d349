"""Layouts of 8-bit pages: one code per number, one scale per token and KV head. Knows no KV format and no model.

The scale of a token is constant along head_dim, so it need not touch the codes: it multiplies a column of the scores
and a column of the softmax weights, and no dequantized page ever exists. The products run on the codes as they are:

    q . (s c + z) = s (q . c) + z sum(q)            sum_j p_j (s_j c_j + z_j) = sum_j (p_j s_j) c_j + sum_j p_j z_j

Scales and zeros are the `sides` of a page, bfloat16: of each token and head the scale of its key, the scale of its
value and, if the code has zeros, the zeros of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot
from pallas_kernels.layouts.codes import Code
from pallas_kernels.layouts.layout import KernelPages, PageShape

Query = tuple[jax.Array, jax.Array]
"""Query vectors and the sum of each, one axis of length 1 in place of head_dim."""

DOT_DTYPE = jnp.dtype(jnp.bfloat16)
"""Of the operands of a kernel's products: it holds every code exactly."""


ALONG = 32
"""The queries that attend to a key lie along it, so an error along a key is one of their scores (measured:
docs/techniques/8-bit-kv.md)."""


class Page(NamedTuple):
    """Codes of keys [rows, kv_heads, head_dim, page_tokens] and values [rows, kv_heads, page_tokens, head_dim], sides
    [rows, kv_heads, 2 or 4, page_tokens], all float32."""

    keys: jax.Array
    values: jax.Array
    sides: jax.Array


@dataclass(frozen=True)
class EightBit:
    """What both layouts share: making codes, and the two products of the reference walk."""

    code: Code
    calibrated: tuple[tuple[float, float], ...] = ()
    """(scale of keys, scale of values) of each layer, from a checkpoint. Empty: every token has its own."""

    def prepare(self, q: jax.Array) -> Query:
        return q, jnp.sum(q, axis=-1, keepdims=True)

    def scores(self, q: Query, page: Page) -> jax.Array:
        s = jnp.einsum("rhmd,rhds->rhms", q[0], page.keys, preferred_element_type=jnp.float32)
        s *= page.sides[:, :, 0, None]
        return s + q[1] * page.sides[:, :, 2, None] if self.code.zeros else s

    def mix(self, p: jax.Array, page: Page) -> jax.Array:
        weights = p * page.sides[:, :, 1, None]
        o = jnp.einsum("rhms,rhsd->rhmd", weights, page.values, preferred_element_type=jnp.float32)
        return o + jnp.sum(p * page.sides[:, :, 3, None], axis=-1, keepdims=True) if self.code.zeros else o

    @property
    def side_count(self) -> int:
        """Scales and zeros of a token and head."""
        return 4 if self.code.zeros else 2

    def encode(
        self, k: jax.Array, v: jax.Array, layer: int | jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """k, v [..., head_dim] -> codes of both, and the sides, `side_count` arrays [...]."""
        given = jnp.asarray(self.calibrated, jnp.float32)[layer] if self.calibrated else (None, None)
        keys, *k_sides = self.code.encode(k, given[0], along=ALONG)
        values, *v_sides = self.code.encode(v, given[1])
        return keys, values, tuple(side for both in zip(k_sides, v_sides, strict=True) for side in both)


@dataclass(frozen=True)
class EightBitRows(EightBit):
    """For kernels. `codes` [pages, layers, 2, kv_heads, page_tokens, head_dim], keys at 0 and values at 1; `sides`
    [pages, layers, kv_heads, 2 or 4, page_tokens]."""

    def pool(self, pages: int, layers: int, kv_heads: int, page_tokens: int, head_dim: int) -> Any:
        return {
            "codes": jax.ShapeDtypeStruct((pages, layers, 2, kv_heads, page_tokens, head_dim), self.code.dtype),
            "sides": jax.ShapeDtypeStruct((pages, layers, kv_heads, self.side_count, page_tokens), jnp.bfloat16),
        }

    def heads_axis(self) -> Any:
        return {"codes": 3, "sides": 2}

    def put_tokens(
        self, pool: Any, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, places: jax.Array
    ) -> Any:
        keys, values, sides = self.encode(k, v, layer)
        put = {"mode": "drop", "unique_indices": True}
        return {
            "codes": pool["codes"].at[pages, layer, :, :, places].set(jnp.stack([keys, values], axis=1), **put),
            "sides": pool["sides"].at[pages, layer, :, :, places].set(jnp.stack(sides, axis=2), **put),
        }

    def put_pages(
        self, pool: Any, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, inside: jax.Array
    ) -> Any:
        keys, values, sides = self.encode(k, v, layer)
        return {
            "codes": _put_pages(
                pool["codes"], layer, jnp.stack([keys, values], axis=1), pages, inside[:, None, None, :, None]
            ),
            "sides": _put_pages(pool["sides"], layer, jnp.stack(sides, axis=2), pages, inside[:, None, None]),
        }

    def page_shape(self, pool: Any) -> PageShape:
        pages, _, _, kv_heads, page_tokens, head_dim = pool["codes"].shape
        return PageShape(pages, kv_heads, page_tokens, head_dim, head_dim)

    def fetch(self, pool: Any, layer: int | jax.Array, ids: jax.Array) -> Page:
        def at(array: jax.Array, *index: Any) -> jax.Array:
            return array.at[(ids, layer, *index)].get(mode="promise_in_bounds").astype(jnp.float32)

        return Page(at(pool["codes"], 0).swapaxes(2, 3), at(pool["codes"], 1), at(pool["sides"]))

    def arrays(self, pool: Any) -> tuple[jax.Array, ...]:
        return pool["codes"], pool["sides"]

    def dot_dtype(self, pool: Any, q: jax.Array) -> jnp.dtype:
        return DOT_DTYPE

    def parts(self, pool: Any) -> tuple[int, int]:
        return 1, 1

    def in_kernel(self, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, *, interpret: bool) -> KernelPages:
        codes, sides = refs
        return _Pages(codes, sides, layer, head, self.code.zeros)


@dataclass(frozen=True)
class _Pages:
    """The same products on one page and head in a kernel, see `layout.KernelPages`; sides are applied in float32."""

    codes: Any
    sides: Any
    layer: jax.Array
    head: jax.Array
    zeros: bool

    def prepare(self, q: tuple[jax.Array, ...]) -> Query:
        return q[0], jnp.sum(q[0].astype(jnp.float32), axis=1)[:, None]

    def scores(self, q: Query, page: jax.Array) -> jax.Array:
        s = dot(q[0], self.codes[page, self.layer, 0, self.head].astype(DOT_DTYPE).T) * self._side(page, 0)
        return s + q[1] * self._side(page, 2) if self.zeros else s

    def mix(self, p: jax.Array, page: jax.Array) -> tuple[jax.Array, ...]:
        weights = (p * self._side(page, 1)).astype(DOT_DTYPE)
        o = dot(weights, self.codes[page, self.layer, 1, self.head].astype(DOT_DTYPE))
        if self.zeros:
            o += jnp.sum(p * self._side(page, 3), axis=1)[:, None]
        return (o,)

    def _side(self, page: jax.Array, index: int) -> jax.Array:
        return self.sides[page, self.layer, self.head, index].astype(jnp.float32)[None]


@dataclass(frozen=True)
class EightBitColumns(EightBit):
    """For the reference walk on CPUs (see `columns` for why): `keys` [pages, layers, kv_heads, head_dim, page_tokens],
    `values` [pages, layers, kv_heads, page_tokens, head_dim], `sides` [pages, layers, kv_heads, 2 or 4, page_tokens].

    All are integers, codes of 8 bits and the bits of bfloat16: XLA's gathers on CPUs convert whole pools of other
    types.
    """

    def pool(self, pages: int, layers: int, kv_heads: int, page_tokens: int, head_dim: int) -> Any:
        shapes = {
            "keys": (head_dim, page_tokens),
            "values": (page_tokens, head_dim),
            "sides": (self.side_count, page_tokens),
        }
        dtypes = {"keys": self.code.bits_dtype, "values": self.code.bits_dtype, "sides": jnp.uint16}
        return {
            name: jax.ShapeDtypeStruct((pages, layers, kv_heads, *shape), dtypes[name])
            for name, shape in shapes.items()
        }

    def heads_axis(self) -> Any:
        return {"keys": 2, "values": 2, "sides": 2}

    def put_tokens(
        self, pool: Any, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, places: jax.Array
    ) -> Any:
        keys, values, sides = self._bits(k, v, layer, side_axis=2)
        put = {"mode": "drop", "unique_indices": True}
        return {
            "keys": pool["keys"].at[pages, layer, :, :, places].set(keys, **put),
            "values": pool["values"].at[pages, layer, :, places].set(values, **put),
            "sides": pool["sides"].at[pages, layer, :, :, places].set(sides, **put),
        }

    def put_pages(
        self, pool: Any, layer: int | jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, inside: jax.Array
    ) -> Any:
        keys, values, sides = self._bits(k, v, layer, side_axis=2)
        columns, rows = inside[:, None, None], inside[:, None, :, None]
        return {
            "keys": _put_pages(pool["keys"], layer, keys.swapaxes(2, 3), pages, columns),
            "values": _put_pages(pool["values"], layer, values, pages, rows),
            "sides": _put_pages(pool["sides"], layer, sides, pages, columns),
        }

    def page_shape(self, pool: Any) -> PageShape:
        pages, _, kv_heads, page_tokens, head_dim = pool["values"].shape
        return PageShape(pages, kv_heads, page_tokens, head_dim, head_dim)

    def fetch(self, pool: Any, layer: int | jax.Array, ids: jax.Array) -> Page:
        sides = _flat_rows(pool["sides"], layer, ids).astype(jnp.uint32) << 16
        return Page(
            self.code.from_bits(_flat_rows(pool["keys"], layer, ids)),
            self.code.from_bits(_flat_rows(pool["values"], layer, ids)),
            lax.bitcast_convert_type(sides, jnp.float32),
        )

    def _bits(
        self, k: jax.Array, v: jax.Array, layer: int | jax.Array, side_axis: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys, values, sides = self.encode(k, v, layer)
        stacked = lax.bitcast_convert_type(jnp.stack(sides, axis=side_axis), jnp.uint16)
        return self.code.to_bits(keys), self.code.to_bits(values), stacked


def _put_pages(
    array: jax.Array, layer: int | jax.Array, new: jax.Array, pages: jax.Array, inside: jax.Array
) -> jax.Array:
    old = array.at[pages, layer].get(mode="clip")
    return array.at[pages, layer].set(jnp.where(inside, new, old), mode="drop", unique_indices=True)


def _flat_rows(array: jax.Array, layer: int | jax.Array, ids: jax.Array) -> jax.Array:
    """Pages `ids` of `layer`, [n, kv_heads, ...]: gathers from flat rows are faster than from many dimensions."""
    _, layers, kv_heads, *page = array.shape
    rows = ((ids * layers + layer) * kv_heads)[:, None] + jnp.arange(kv_heads)
    x = array.reshape(-1, page[0] * page[1]).at[rows.reshape(-1)].get(mode="clip")
    return x.reshape(len(ids), kv_heads, *page)
