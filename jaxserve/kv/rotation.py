"""A rotation of keys and queries that leaves their products as they are and spreads what is large. Knows no format.

Rounding errs in proportion to a channel's range, and a query weighs that error by its own size in that channel. Where
the channels that are large in keys are large in queries too, as in trained models, a basis in which all channels are
alike loses less. The Hadamard matrix gives one without knowing the model (QuaRot, arXiv:2404.00456).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

ROTATIONS = ("none", "hadamard")


def hadamard(x: jax.Array, scale: float) -> jax.Array:
    """float32 x [..., n] times Sylvester's matrix [n, n] times `scale`, a power of two.

    Sums and differences of two numbers at a time, in one order: a vector has the same bits in any program, which a
    matrix product would not promise.
    """
    n = x.shape[-1]
    x = x.astype(jnp.float32)
    for _ in range(n.bit_length() - 1):
        pairs = x.reshape(*x.shape[:-1], n // 2, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        x = jnp.concatenate([even + odd, even - odd], axis=-1)
    return x * scale


def rotated_keys(k: jax.Array) -> jax.Array:
    return hadamard(k, 2.0 ** -(k.shape[-1].bit_length() // 2))


def rotated_queries(q: jax.Array) -> jax.Array:
    """Their products with `rotated_keys` are those of q and k: the two scales make 1 / n together, both exact."""
    bits = q.shape[-1].bit_length()
    return hadamard(q, 2.0 ** -(bits - 1 - bits // 2)).astype(q.dtype)
