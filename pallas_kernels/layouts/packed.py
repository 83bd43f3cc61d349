"""Pages of packed codes: which arrays they are and how a full page becomes one. Knows no query.

Each of K and V is quantized along one of two axes: per channel, one scale and minimum for each channel over the tokens
of the page, or per token, one for each token over a group of neighbouring channels. K codes are stored token by token
and V codes channel by channel, each packed along the channels, so that both products of attention run along the last
axis of the codes they read.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.layouts.layout import PageShape
from pallas_kernels.layouts.packing import BITS, Affine, affine, clipped, from_bits, pack, quantize, to_bits, unpack

Axis = Literal["channel", "token"]

HEAD_DIMS = (32, 64, 128)
"""Channels of keys and of values; 32 in one group, and with 4 bits or more: fields of fewer than 16 channels are too
narrow for a product on tensor cores."""
PAGE_TOKENS = (32, 64, 128)


@dataclass(frozen=True)
class PackedLayout:
    """The pages that the layouts of packed codes share.

    A pool is a dict of arrays [pages, layers, kv_heads, ...]; per page, layer and head:

        k_codes        uint8 [page_tokens, head_dim * bits / 8]
        v_codes        uint8 [value_dim * bits / 8, page_tokens]
        *_scale, *_min uint16 [dim] per channel; [dim / group, page_tokens] per token: the bits of bfloat16, because
                       XLA's gathers on CPUs would convert whole pools of it
    """

    bits: int
    group: int = 64
    """Channels that share a scale where quantization is per token."""

    k_axis: ClassVar[Axis] = "channel"
    v_axis: ClassVar[Axis] = "token"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"KV codes have 2, 4 or 8 bits, not {self.bits}.")
        if self.group not in (32, 64):
            raise ValueError(f"Groups have 32 or 64 channels, not {self.group}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays of a page, in the order in which kernels take them."""
        return ("k_codes", "k_scale", "k_min", "v_codes", "v_scale", "v_min")

    def shapes(
        self, kv_heads: int, page_tokens: int, head_dim: int, value_dim: int | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        value_dim = head_dim if value_dim is None else value_dim
        for dim in (head_dim, value_dim):
            self._check(dim)
        if page_tokens not in PAGE_TOKENS:
            raise ValueError(f"Packed KV pages have 32, 64 or 128 tokens, not {page_tokens}.")

        def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((kv_heads, *shape), dtype)

        def meta(dim: int, axis: Axis) -> jax.ShapeDtypeStruct:
            shape = (dim,) if axis == "channel" else (dim // self.group, page_tokens)
            return array(jnp.uint16, *shape)

        return {
            "k_codes": array(jnp.uint8, page_tokens, head_dim * self.bits // 8),
            "k_scale": meta(head_dim, self.k_axis),
            "k_min": meta(head_dim, self.k_axis),
            "v_codes": array(jnp.uint8, value_dim * self.bits // 8, page_tokens),
            "v_scale": meta(value_dim, self.v_axis),
            "v_min": meta(value_dim, self.v_axis),
        }

    def _check(self, dim: int) -> None:
        """ValueError if codes of `dim` channels cannot be packed."""
        if dim not in HEAD_DIMS or (dim == 32 and self.bits < 4):
            known = "64 or 128" if self.bits < 4 else "32, 64 or 128"
            raise ValueError(f"Packed KV pages of {self.bits} bits need a head_dim of {known}, not {dim}.")
        if dim % self.group:
            raise ValueError(f"A head_dim of {dim} does not divide into groups of {self.group} channels.")

    def encode(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        k_codes, k_affine = self._quantize(k, self.k_axis)
        v_codes, v_affine = self._quantize(v, self.v_axis)
        return {
            "k_codes": pack(k_codes, self.bits),
            "k_scale": to_bits(k_affine.scale),
            "k_min": to_bits(k_affine.minimum),
            "v_codes": pack(v_codes, self.bits).swapaxes(-1, -2),
            "v_scale": to_bits(v_affine.scale),
            "v_min": to_bits(v_affine.minimum),
        }

    def decode(self, page: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The keys and values that the codes of `page`, arrays [n, kv_heads, ...], stand for: float32 [n, kv_heads,
        page_tokens, head_dim and value_dim]."""
        k_codes, v_codes = self.codes(page)
        metas = {name: from_bits(page[name]) for name in ("k_scale", "k_min", "v_scale", "v_min")}
        k = k_codes * self._spread(metas["k_scale"], self.k_axis) + self._spread(metas["k_min"], self.k_axis)
        v = v_codes * self._spread(metas["v_scale"], self.v_axis) + self._spread(metas["v_min"], self.v_axis)
        return k, v

    def codes(self, page: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The codes of `page` as float32 [n, kv_heads, page_tokens, head_dim and value_dim]: K, V."""
        k = unpack(page["k_codes"], self.bits)
        v = unpack(page["v_codes"].swapaxes(-1, -2), self.bits)
        return k.astype(jnp.float32), v.astype(jnp.float32)

    def page_shape(self, pool: dict[str, jax.Array]) -> PageShape:
        pages, _, kv_heads, page_tokens, k_width = pool["k_codes"].shape
        v_width = pool["v_codes"].shape[-2]
        return PageShape(pages, kv_heads, page_tokens, k_width * 8 // self.bits, v_width * 8 // self.bits)

    def gather(self, pool: dict[str, jax.Array], layer: int | jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        return {name: pool[name].at[ids, layer].get(mode="promise_in_bounds") for name in self.names}

    def arrays(self, pool: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(pool[name] for name in self.names)

    def dot_dtype(self, pool: Any, q: jax.Array) -> jnp.dtype:
        return q.dtype

    def _quantize(self, x: jax.Array, axis: Axis) -> tuple[jax.Array, Affine]:
        fit = clipped if self.bits == 2 else functools.partial(affine, bits=self.bits)
        if axis == "channel":
            to = fit(x, -2)
        else:
            grouped = fit(x.reshape(*x.shape[:-1], -1, self.group), -1)
            to = Affine(*(meta.swapaxes(-1, -2) for meta in grouped))
        wide = Affine(*(self._spread(meta, axis) for meta in to))
        return quantize(x, wide, self.bits), to

    def _spread(self, meta: jax.Array, axis: Axis) -> jax.Array:
        """A scale or minimum as float32 that broadcasts against [..., page_tokens, head_dim]."""
        meta = meta.astype(jnp.float32)
        if axis == "channel":
            return meta[..., None, :]
        return jnp.repeat(meta.swapaxes(-1, -2), self.group, axis=-1)


def page_bytes(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes of one layer of one page."""
    return sum(math.prod(one.shape) * one.dtype.itemsize for one in shapes.values())
