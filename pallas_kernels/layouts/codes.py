"""8-bit codes of vectors: what a code and its scale stand for. Knows no pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

SIDE_DTYPE = jnp.dtype(jnp.bfloat16)
"""Of scales and zeros. Codes are taken against the stored values, so rounding those (by at most 1/512) costs no
accuracy, and pushes no number beyond the largest code by more than half a step."""

LARGEST = float(jnp.finfo(SIDE_DTYPE).max) / 2
"""Magnitude to which numbers are clipped, so that no scale or zero rounds to infinity."""


class Code(Protocol):
    """A way to store a vector in 8 bits per number."""

    @property
    def dtype(self) -> jnp.dtype:
        """Of the codes."""
        ...

    @property
    def zeros(self) -> bool:
        """Whether a vector has a zero beside its scale."""
        ...

    def encode(self, x: jax.Array, scales: jax.Array | None = None, *, along: int = 0) -> tuple[jax.Array, ...]:
        """x [..., head_dim] -> codes [..., head_dim], scales [...] and, if there are, zeros [...]. NaN becomes 0.

        `scales`: given ones, that broadcast to [...]; what exceeds their range is clipped. Default: each vector has one
        that holds it. `along`: how much more an error along the vector weighs than one across, where there is a choice.
        """
        ...

    @property
    def bits_dtype(self) -> jnp.dtype:
        """An integer dtype for the bits of a code."""
        ...

    def to_bits(self, codes: jax.Array) -> jax.Array: ...

    def from_bits(self, bits: jax.Array) -> jax.Array:
        """The codes as float32."""
        ...


@dataclass(frozen=True)
class Int8:
    """x = scale * code + zero, codes in [-127, 127], the zero in the middle of the vector's range."""

    dtype = jnp.dtype(jnp.int8)
    bits_dtype = jnp.dtype(jnp.int8)
    zeros = True
    peak = 127.0

    def encode(self, x: jax.Array, scales: jax.Array | None = None, *, along: int = 0) -> tuple[jax.Array, ...]:
        x = _finite(x)
        zeros = ((jnp.min(x, axis=-1) + jnp.max(x, axis=-1)) * 0.5).astype(SIDE_DTYPE)
        centred = x - zeros[..., None].astype(jnp.float32)
        codes, scales = _scaled(centred, scales, self.peak)
        return jnp.round(codes).astype(self.dtype), scales, zeros

    def to_bits(self, codes: jax.Array) -> jax.Array:
        return codes

    def from_bits(self, bits: jax.Array) -> jax.Array:
        return bits.astype(jnp.float32)


@dataclass(frozen=True)
class Fp8:
    """x = scale * code, the code a float8_e4m3fn: finer near zero, 1/16 off at worst."""

    dtype = jnp.dtype(jnp.float8_e4m3fn)
    bits_dtype = jnp.dtype(jnp.uint8)
    zeros = False
    peak = 448.0

    def encode(self, x: jax.Array, scales: jax.Array | None = None, *, along: int = 0) -> tuple[jax.Array, ...]:
        x = _finite(x)
        codes, scales = _scaled(x, _fitting(x, along) if scales is None else scales, self.peak)
        return codes.astype(self.dtype), scales

    def to_bits(self, codes: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(codes, jnp.uint8)

    def from_bits(self, bits: jax.Array) -> jax.Array:
        # The bits of a float16 of 2^-8 times the value, subnormal codes included.
        half = ((bits & 0x80).astype(jnp.uint16) << 8) | ((bits & 0x7F).astype(jnp.uint16) << 7)
        return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256.0


OCTAVE = (448, 416, 384, 352, 320, 288, 256, 240)
"""The codes of fp8 above 224, to 448: what a vector's largest number may become."""

STEPS = 2**10
"""In the largest power of two in a vector: with up to 256 numbers, and errors of which those along the vector weigh up
to 64 times as much, all sums below fit an int32."""

TINY = 1e-30
"""A vector whose numbers are all below has the first scale: reciprocals would leave float32."""


def _fitting(x: jax.Array, along: int) -> jax.Array:
    """Scales [...] for vectors x [..., n] in fp8: of those at which the largest number is one of `OCTAVE`, the one with
    the least squared error, of which the part along the vector counts 1 + `along` times.

    Codes have so few bits that their products with a scale are exact, and sums are of whole numbers: the choice is the
    same in any program.
    """
    largest = jnp.max(jnp.abs(x), axis=-1)[..., None]
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000, jnp.float32)
    steps = jnp.where(largest < TINY, 0.0, STEPS / power)
    # Not by way of bfloat16: compilers may leave out two conversions.
    scales = lax.reduce_precision(largest / jnp.asarray(OCTAVE, jnp.float32), exponent_bits=8, mantissa_bits=7)
    inverse = jnp.where(largest < TINY, 0.0, 1 / scales)
    # [..., n, candidates]: CPUs work on the eight candidates at once.
    near = _four_bits(x[..., None] * inverse[..., None, :]) * scales[..., None, :]
    off = ((x[..., None] - near) * steps[..., None]).astype(jnp.int32)
    error = jnp.sum(off * off, axis=-2)
    if along:
        whole = (x * steps).astype(jnp.int32)
        length = jnp.maximum(jnp.sum(whole * whole, axis=-1, keepdims=True), 1).astype(jnp.float32)
        shadow = jnp.sum(off * whole[..., None], axis=-2).astype(jnp.float32)
        error += along * (shadow * shadow / length).astype(jnp.int32)
    return jnp.take_along_axis(scales, jnp.argmin(error, axis=-1, keepdims=True), axis=-1)[..., 0]


def _four_bits(x: jax.Array) -> jax.Array:
    """float32 x rounded as fp8 rounds, without its bounds: four significant bits, ties to even."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF, jnp.float32)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.nan_to_num(x.astype(jnp.float32), nan=0.0), -LARGEST, LARGEST)


def _scaled(x: jax.Array, scales: jax.Array | None, peak: float) -> tuple[jax.Array, jax.Array]:
    """x over its scales, within [-peak, peak], and the scales as they are stored; 1 for a vector of zeros."""
    if scales is None:
        scales = jnp.max(jnp.abs(x), axis=-1) / peak
    stored = jnp.broadcast_to(scales, x.shape[:-1]).astype(SIDE_DTYPE)
    stored = jnp.where(stored > 0, stored, jnp.ones_like(stored))
    return jnp.clip(x / stored[..., None].astype(jnp.float32), -peak, peak), stored
