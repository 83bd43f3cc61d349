"""Packed pages inside a Triton kernel: codes unpacked in registers, four at a time, and the products on them.

Arrays in a kernel cannot be cut, so a head's channels are handled in blocks: ranges of channels whose codes are one
field of a range of bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import dot
from pallas_kernels.layouts.lanes import Field, to_bfloat16, to_int8
from pallas_kernels.layouts.packing import from_bits, half, quantize8

if TYPE_CHECKING:
    from pallas_kernels.layouts.packed import PackedLayout

MIN_INNER = 32
"""Smallest inner dimension of a product of 8-bit integers on tensor cores."""


@dataclass(frozen=True)
class PackedRefs:
    """The arrays of a packed pool, one layer and KV head of them, inside a kernel.

    `k_width` and `v_width` are the channels of a block. Keys are the right side of a product along channels: fields
    narrower than MIN_INNER are read in pairs. Values are its result: 16 channels are enough.
    """

    refs: dict[str, Any]
    layer: jax.Array
    head: jax.Array
    bits: int
    group: int
    k_dim: int
    v_dim: int
    page_tokens: int
    interpret: bool

    @classmethod
    def of(
        cls, layout: PackedLayout, refs: tuple[Any, ...], layer: jax.Array, head: jax.Array, interpret: bool
    ) -> PackedRefs:
        named = dict(zip(layout.names, refs, strict=True))
        page_tokens, k_bytes = named["k_codes"].shape[-2:]
        v_bytes = named["v_codes"].shape[-2]
        k_dim, v_dim = k_bytes * 8 // layout.bits, v_bytes * 8 // layout.bits
        return cls(named, layer, head, layout.bits, layout.group, k_dim, v_dim, page_tokens, interpret)

    @property
    def k_field(self) -> int:
        """Channels of a field of K: those whose codes are the same bits of neighbouring bytes."""
        return self.k_dim * self.bits // 8

    @property
    def v_field(self) -> int:
        return self.v_dim * self.bits // 8

    @property
    def k_width(self) -> int:
        return k_width(self.bits, self.group, self.k_dim)

    @property
    def v_width(self) -> int:
        return v_width(self.bits, self.group, self.v_dim)

    def k_blocks(self, partition: int) -> range:
        """The blocks of K in a group of channels."""
        per = self.group // self.k_width
        return range(partition * per, (partition + 1) * per)

    def v_blocks(self, partition: int) -> range:
        per = self.group // self.v_width
        return range(partition * per, (partition + 1) * per)

    @property
    def k_partitions(self) -> range:
        return range(self.k_dim // self.group)

    @property
    def v_partitions(self) -> range:
        return range(self.v_dim // self.group)

    def channel_scale(self, side: str, page: jax.Array, block: int) -> jax.Array:
        """Scales of one block of channels, float32 [1, width]; `side` is k or v."""
        return from_bits(self._channels(f"{side}_scale", page, block))

    def channel_min(self, side: str, page: jax.Array, block: int) -> jax.Array:
        return from_bits(self._channels(f"{side}_min", page, block))

    def channel_mid(self, side: str, page: jax.Array, block: int) -> jax.Array:
        """What signed code 0 stands for, float32 [1, width]."""
        return self.channel_min(side, page, block) + half(self.bits) * self.channel_scale(side, page, block)

    def token_scale(self, side: str, page: jax.Array, partition: int) -> jax.Array:
        """Scales of the tokens for one group of channels, float32 [1, page_tokens]."""
        return from_bits(self._tokens(f"{side}_scale", page, partition))

    def token_min(self, side: str, page: jax.Array, partition: int) -> jax.Array:
        return from_bits(self._tokens(f"{side}_min", page, partition))

    def token_mid(self, side: str, page: jax.Array, partition: int) -> jax.Array:
        """What signed code 0 stands for, float32 [1, page_tokens]."""
        return self.token_min(side, page, partition) + half(self.bits) * self.token_scale(side, page, partition)

    def k_sum(self, page: jax.Array, partition: int) -> jax.Array:
        """Sums of signed codes over a group of channels, token by token, float32 [1, page_tokens]."""
        return self._tokens("k_sum", page, partition).astype(jnp.float32)

    def v_sum(self, page: jax.Array, block: int) -> jax.Array:
        """Sums of signed codes over the page, channel by channel, float32 [1, v_width]."""
        return self._channels("v_sum", page, block).astype(jnp.float32)

    def _channels(self, name: str, page: jax.Array, block: int) -> jax.Array:
        width = self.k_width if name.startswith("k") else self.v_width
        return self.refs[name][page, self.layer, self.head, pl.ds(block * width, width)][None, :]

    def _tokens(self, name: str, page: jax.Array, partition: int) -> jax.Array:
        return self.refs[name][page, self.layer, self.head, partition][None, :]

    def k_bytes(self, page: jax.Array, block: int) -> tuple[jax.Array, Field]:
        """Bytes that hold the codes of one block of K, [page_tokens, k_width], and where in them."""
        codes = self.refs["k_codes"]
        first = block * self.k_width // self.k_field
        if self.k_width <= self.k_field:
            start = block * self.k_width % self.k_field
            return codes[page, self.layer, self.head, :, pl.ds(start, self.k_width)], Field(self.bits, first)
        shape = (self.page_tokens, self.k_width)
        token, channel = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        packed = codes[page, self.layer, self.head, token, channel % self.k_field]
        upper = jnp.where(channel < self.k_field, 0, 255).astype(jnp.uint8)
        return packed, Field(self.bits, first, upper)

    def v_bytes(self, page: jax.Array, block: int) -> tuple[jax.Array, Field]:
        """Bytes that hold the codes of one block of V, [v_width, page_tokens], and where in them."""
        first, start = divmod(block * self.v_width, self.v_field)
        packed = self.refs["v_codes"][page, self.layer, self.head, pl.ds(start, self.v_width)]
        return packed, Field(self.bits, first)

    def product(self, a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
        """sum_i a[i] b[i]^T of int8 [m, n] and [s, n], as float32. With b from `k_int8` or `v_int8` it is 1 / `unit`
        times the product with the codes."""
        total = jnp.zeros((a[0].shape[0], b[0].shape[0]), jnp.int32)
        for x, y in zip(a, b, strict=True):
            total += dot(x, y.T)
        return total.astype(jnp.float32)

    @property
    def unit(self) -> float:
        return 1.0 / (1 << (8 - self.bits))

    def k_int8(self, page: jax.Array, block: int) -> jax.Array:
        return to_int8(*self.k_bytes(page, block), interpret=self.interpret)

    def v_int8(self, page: jax.Array, block: int) -> jax.Array:
        return to_int8(*self.v_bytes(page, block), interpret=self.interpret)

    def k_bfloat16(self, page: jax.Array, block: int) -> jax.Array:
        return to_bfloat16(*self.k_bytes(page, block), interpret=self.interpret)

    def v_bfloat16(self, page: jax.Array, block: int) -> jax.Array:
        return to_bfloat16(*self.v_bytes(page, block), interpret=self.interpret)


def k_width(bits: int, group: int, head_dim: int) -> int:
    return min(group, max(MIN_INNER, head_dim * bits // 8))


def v_width(bits: int, group: int, head_dim: int) -> int:
    return min(group, head_dim * bits // 8)


def parts(layout: PackedLayout, pool: dict[str, jax.Array]) -> tuple[int, int]:
    """See `Layout.parts`."""
    shape = layout.page_shape(pool)
    return (
        shape.head_dim // k_width(layout.bits, layout.group, shape.head_dim),
        shape.value_dim // v_width(layout.bits, layout.group, shape.value_dim),
    )


@dataclass(frozen=True)
class KiviPages:
    """Products of bfloat16. Keys' scales are folded into q and values' into p, so that a code costs its conversion."""

    page: PackedRefs

    def prepare(self, q: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return q

    def scores(self, q: tuple[jax.Array, ...], page: jax.Array) -> jax.Array:
        x = self.page
        s = jnp.zeros((q[0].shape[0], x.page_tokens), jnp.float32)
        shift = jnp.zeros((q[0].shape[0], 1), jnp.float32)
        for block, part in enumerate(q):
            wide = part.astype(jnp.float32)
            folded = (wide * x.channel_scale("k", page, block)).astype(jnp.bfloat16)
            s += dot(folded, x.k_bfloat16(page, block).T)
            shift += jnp.sum(wide * x.channel_min("k", page, block), axis=1, keepdims=True)
        return s + shift

    def mix(self, p: jax.Array, page: jax.Array) -> tuple[jax.Array, ...]:
        x = self.page
        out = []
        for partition in x.v_partitions:
            folded = (p * x.token_scale("v", page, partition)).astype(jnp.bfloat16)
            shift = jnp.sum(p * x.token_min("v", page, partition), axis=1, keepdims=True)
            out += [dot(folded, x.v_bfloat16(page, block).T) + shift for block in x.v_blocks(partition)]
        return tuple(out)


@dataclass(frozen=True)
class HackFoldedPages:
    """Form F, see `hack.HackFolded`."""

    page: PackedRefs

    def prepare(self, q: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return q

    def scores(self, q: tuple[jax.Array, ...], page: jax.Array) -> jax.Array:
        x = self.page
        s = jnp.zeros((q[0].shape[0], x.page_tokens), jnp.float32)
        shift = jnp.zeros((q[0].shape[0], 1), jnp.float32)
        for partition in x.k_partitions:
            blocks = x.k_blocks(partition)
            wide = [q[block].astype(jnp.float32) for block in blocks]
            folded = [part * x.channel_scale("k", page, block) for part, block in zip(wide, blocks, strict=True)]
            codes, scale, center = quantize8(*folded)
            product = x.product(codes, [x.k_int8(page, block) for block in blocks])
            s += (scale * x.unit) * product + center * x.k_sum(page, partition)
            for part, block in zip(wide, blocks, strict=True):
                shift += jnp.sum(part * x.channel_mid("k", page, block), axis=1, keepdims=True)
        return s + shift

    def mix(self, p: jax.Array, page: jax.Array) -> tuple[jax.Array, ...]:
        x = self.page
        out = []
        for partition in x.v_partitions:
            codes, scale, center = quantize8(p * x.token_scale("v", page, partition))
            shift = jnp.sum(p * x.token_mid("v", page, partition), axis=1, keepdims=True)
            for block in x.v_blocks(partition):
                product = x.product(codes, [x.v_int8(page, block)])
                out.append((scale * x.unit) * product + (center * x.v_sum(page, block) + shift))
        return tuple(out)


class PartitionedQ(NamedTuple):
    """One partition of q in 8 bits: int8 codes by block, the rest float32 [m, 1]; `scale` includes `unit`."""

    codes: tuple[jax.Array, ...]
    scale: jax.Array
    center: jax.Array
    total: jax.Array


@dataclass(frozen=True)
class HackPartitionedPages:
    """Form P, see `hack.HackPartitioned`."""

    page: PackedRefs

    def prepare(self, q: tuple[jax.Array, ...]) -> tuple[PartitionedQ, ...]:
        made = []
        for partition in self.page.k_partitions:
            wide = [q[block].astype(jnp.float32) for block in self.page.k_blocks(partition)]
            codes, scale, center = quantize8(*wide)
            total = functools.reduce(jnp.add, [jnp.sum(part, axis=1, keepdims=True) for part in wide])
            made.append(PartitionedQ(codes, scale * self.page.unit, center, total))
        return tuple(made)

    def scores(self, q: tuple[PartitionedQ, ...], page: jax.Array) -> jax.Array:
        x = self.page
        s = jnp.zeros((q[0].scale.shape[0], x.page_tokens), jnp.float32)
        for partition, own in zip(x.k_partitions, q, strict=True):
            product = own.scale * x.product(own.codes, [x.k_int8(page, block) for block in x.k_blocks(partition)])
            product += own.center * x.k_sum(page, partition)
            s += x.token_scale("k", page, partition) * product + x.token_mid("k", page, partition) * own.total
        return s

    def mix(self, p: jax.Array, page: jax.Array) -> tuple[jax.Array, ...]:
        x = self.page
        codes, scale, center = quantize8(p)
        total = jnp.sum(p, axis=1, keepdims=True)
        out = []
        for partition in x.v_partitions:
            for block in x.v_blocks(partition):
                product = (scale * x.unit) * x.product(codes, [x.v_int8(page, block)]) + center * x.v_sum(page, block)
                out.append(x.channel_scale("v", page, block) * product + x.channel_mid("v", page, block) * total)
        return tuple(out)
