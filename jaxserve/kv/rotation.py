"""A rotation of keys and queries that leaves their products as they are and spreads what is large. Knows no format.

Rounding errs in proportion to a channel's range, and a query weighs that error by its own size in that channel. Where
the channels that are large in keys are large in queries too, as in trained models, a basis in which all channels are
alike loses less. The Hadamard matrix gives one without knowing the model (QuaRot, arXiv:2404.00456).
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

EXACT = 1 << 24
"""Whole numbers up to here are exact in float32."""

TINY = 1e-30

ROTATIONS = ("none", "hadamard")


def check_rotation(rotation: str, channels: int | None = None) -> None:
    """Raises ValueError: a rotation that does not exist, or not for keys of `channels`."""
    if rotation not in ROTATIONS:
        raise ValueError(f"--kv-key-rotation {rotation} is not known; choose one of {', '.join(ROTATIONS)}")
    if rotation != "none" and channels is not None and channels & (channels - 1):
        raise ValueError(f"--kv-key-rotation {rotation} needs a power of two of channels in a key, not {channels}")


def turned_keys(k: jax.Array, rotation: str) -> jax.Array:
    """k [..., n], float32 if `rotation` turns it."""
    return rotated_keys(k) if rotation == "hadamard" else k


def turned_queries(q: jax.Array, rotation: str) -> jax.Array:
    """q [..., n] for keys that were turned alike."""
    return rotated_queries(q) if rotation == "hadamard" else q


def rotated_keys(k: jax.Array) -> jax.Array:
    """float32 k [..., n] times Sylvester's matrix, over about sqrt(n)."""
    return _hadamard(k, 2.0 ** -(k.shape[-1].bit_length() // 2))


def rotated_queries(q: jax.Array) -> jax.Array:
    """Of q's type. Their products with `rotated_keys` are those of q and k: the two divisors make n together, and both
    are powers of two."""
    bits = q.shape[-1].bit_length()
    return _hadamard(q, 2.0 ** -(bits - 1 - bits // 2)).astype(q.dtype)


def _hadamard(x: jax.Array, scale: float) -> jax.Array:
    """x [..., n] times Sylvester's matrix [n, n] times `scale`, a power of two.

    Each vector is rounded to whole numbers of which n sum up below 2^24 (18 bits and a sign for 64 channels): float32
    then adds them exactly in any order, and a vector has the same bits in any program, which other products do not
    promise.
    """
    n = x.shape[-1]
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    unit = jnp.where(largest < TINY, 1.0, largest * (n / EXACT))
    whole = jnp.floor(x / unit + 0.5)
    return jnp.einsum("...i,ij->...j", whole, jnp.asarray(_matrix(n)), precision="highest") * (unit * scale)


@cache
def _matrix(n: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
