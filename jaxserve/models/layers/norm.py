"""Root-mean-square normalization."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.layers.param import param


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., n] / rms(x) * weight (arXiv:1910.07467), computed in float32, in the dtype of x.

    `weight` broadcasts against x.
    """
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (scaled * weight.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """rms_norm with a weight [n]; `offset` is added to the stored weight."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype, offset: float = 0.0):
        self.eps = eps
        self.offset = offset
        self.weight = param((size,), ("norm",), dtype, "zero" if offset else "one")

    def scale(self) -> jax.Array:
        """What normalized rows are multiplied by: float32 [n]."""
        return self.weight.get_value().astype(jnp.float32) + self.offset

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale(), self.eps)
