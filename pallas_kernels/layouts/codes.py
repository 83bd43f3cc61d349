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

    def encode(self, x: jax.Array, scales: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """x [..., head_dim] -> codes [..., head_dim], scales [...] and, if there are, zeros [...]. NaN becomes 0.

        `scales`: given ones, that broadcast to [...]; what exceeds their range is clipped. Default: each vector has the
        smallest scale that holds it.
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

    def encode(self, x: jax.Array, scales: jax.Array | None = None) -> tuple[jax.Array, ...]:
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

    def encode(self, x: jax.Array, scales: jax.Array | None = None) -> tuple[jax.Array, ...]:
        codes, scales = _scaled(_finite(x), scales, self.peak)
        return codes.astype(self.dtype), scales

    def to_bits(self, codes: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(codes, jnp.uint8)

    def from_bits(self, bits: jax.Array) -> jax.Array:
        # The bits of a float16 of 2^-8 times the value, subnormal codes included.
        half = ((bits & 0x80).astype(jnp.uint16) << 8) | ((bits & 0x7F).astype(jnp.uint16) << 7)
        return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256.0


def _finite(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.nan_to_num(x.astype(jnp.float32), nan=0.0), -LARGEST, LARGEST)


def _scaled(x: jax.Array, scales: jax.Array | None, peak: float) -> tuple[jax.Array, jax.Array]:
    """x over its scales, within [-peak, peak], and the scales as they are stored; 1 for a vector of zeros."""
    if scales is None:
        scales = jnp.max(jnp.abs(x), axis=-1) / peak
    stored = jnp.broadcast_to(scales, x.shape[:-1]).astype(SIDE_DTYPE)
    stored = jnp.where(stored > 0, stored, jnp.ones_like(stored))
    return jnp.clip(x / stored[..., None].astype(jnp.float32), -peak, peak), stored
