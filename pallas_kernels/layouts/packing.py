"""Codes of 2, 4 or 8 bits in bytes, and the affine quantizers that make them. Pure functions; knows no page.

Planar packing: with n codes in a row and F = 8 / bits fields to a byte, byte b holds the codes b, b + n/F, ... from
its lowest bits up. One field of all bytes is then a range of neighbouring codes, so a kernel unpacks a field with
one shift and one mask and never interleaves.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BITS = (2, 4, 8)

LARGEST = 2.0**126
"""Values beyond are cut to it, so that no code stands for infinity: a masked row computes 0 * value."""

ROUNDER = 1.5 * 2**23
"""Added to a small float32 it leaves the nearest integer in the lowest bits."""

TINY = 1e-30
"""A range below this counts as none: its reciprocal would leave float32."""


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint8 codes [..., n] below 2^bits -> uint8 [..., n * bits / 8]."""
    fields = 8 // bits
    planes = jnp.split(codes, fields, axis=-1)
    packed = planes[0]
    for field in range(1, fields):
        packed = packed | (planes[field] << (bits * field))
    return packed


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`."""
    mask = (1 << bits) - 1
    return jnp.concatenate([(packed >> shift) & mask for shift in range(0, 8, bits)], axis=-1)


class Affine(NamedTuple):
    """x is about code * scale + minimum, both bfloat16."""

    scale: jax.Array
    minimum: jax.Array


def affine(x: jax.Array, axis: int, bits: int) -> Affine:
    """The quantizer that spans the values of x along `axis`; scale 1 where they are all equal."""
    x = x.astype(jnp.float32)
    levels = (1 << bits) - 1
    low, high = (jnp.clip(bound(x, axis), -LARGEST, LARGEST) for bound in (jnp.min, jnp.max))
    scale = ((high - low) / levels).astype(jnp.bfloat16)
    return Affine(jnp.where(scale == 0, jnp.ones_like(scale), scale), low.astype(jnp.bfloat16))


GRID = 960
"""Steps into which `clipped` cuts a range: each of its ranges is whole steps wide, and three levels apart too."""

CUTS = (0, 2, 4, 6, 8)
"""Thirty-seconds of the range that `clipped` may leave out at either end; sums of two powers of two or less."""


def clipped(x: jax.Array, axis: int) -> Affine:
    """The quantizer of 2 bits whose squared error along `axis` is least, of those that leave out as much of the range
    at one end as at the other. Four levels that span all values lie too far apart: the outermost values are few.

    The choice is made in integers, and values are multiplied by powers of two alone before they are added: it depends
    neither on the order of a sum nor on what a compiler fuses, so a page has the same codes in any program.
    """
    x = x.astype(jnp.float32)
    low, high = (jnp.clip(bound(x, axis, keepdims=True), -LARGEST, LARGEST) for bound in (jnp.min, jnp.max))
    spread = high - low
    step = jnp.where(spread < TINY, 1.0, spread / GRID)
    place = jnp.clip(jnp.floor((x - low) / step + 0.5), 0, GRID).astype(jnp.int32)
    best = chosen = jnp.zeros((), jnp.int32)
    for index, cut in enumerate(CUTS):
        first, apart = cut * GRID // 32, (GRID - cut * GRID // 16) // 3
        inside = jnp.clip(place - first, 0, 3 * apart)
        off = place - first - lax.div(inside + apart // 2, apart) * apart
        error = jnp.sum(off * off, axis=axis, keepdims=True)
        chosen = jnp.where(error < best, index, chosen) if index else jnp.zeros_like(error)
        best = jnp.minimum(best, error) if index else error

    def of_choice(values: list[float]) -> jax.Array:
        return jnp.asarray(values, jnp.float32)[chosen]

    high_bits = of_choice([(cut & 12) / 32 for cut in CUTS])
    low_bits = of_choice([(cut & 3) / 32 for cut in CUTS])
    minimum = low + spread * high_bits + spread * low_bits
    scale = (spread * of_choice([1 - cut / 16 for cut in CUTS]) / 3).astype(jnp.bfloat16)
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    return Affine(jnp.squeeze(scale, axis), jnp.squeeze(minimum, axis).astype(jnp.bfloat16))


def quantize(x: jax.Array, to: Affine, bits: int) -> jax.Array:
    """Nearest codes, uint8; `to` broadcasts against x. Codes are made for the stored scale, not for the exact one."""
    steps = (x.astype(jnp.float32) - to.minimum.astype(jnp.float32)) / to.scale.astype(jnp.float32)
    return jnp.clip(jnp.floor(steps + 0.5), 0, (1 << bits) - 1).astype(jnp.uint8)


def to_bits(x: jax.Array) -> jax.Array:
    """bfloat16 as uint16."""
    return lax.bitcast_convert_type(x, jnp.uint16)


def from_bits(x: jax.Array) -> jax.Array:
    """The inverse of `to_bits`, as float32."""
    return lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)


def half(bits: int) -> int:
    """What a signed code lacks to the stored one. Signed codes are integers around 0: rounding the other side of a
    product costs its error times the code."""
    return 1 << (bits - 1)


def quantize8(*parts: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """float32 vectors [..., n], given as arrays side by side along n, to 8 bits: one scale for each vector.

    Returns the codes of each array, int8, then `scale` and `center` [..., 1]: x is about scale * codes + center,
    exactly so where a vector is constant. Runs inside kernels and outside.
    """
    low = functools.reduce(jnp.minimum, [jnp.min(x, axis=-1, keepdims=True) for x in parts])
    high = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in parts])
    spread = high - low
    flat = spread < TINY
    inverse = jnp.where(flat, 0.0, 255.0 / jnp.where(flat, 1.0, spread))
    scale = jnp.where(flat, 0.0, spread * (1 / 255))
    # The lowest byte is the code, for one operation instead of six.
    near = ((x - low) * inverse + (ROUNDER - 128.0) for x in parts)
    codes = tuple(lax.bitcast_convert_type(x, jnp.int32).astype(jnp.int8) for x in near)
    return codes, scale, low + 128.0 * scale
