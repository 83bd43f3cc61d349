"""Parameters of a module: shape, dtype, logical axis names and how training starts them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]


def param(shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, init: str) -> nnx.Param:
    """A parameter with its logical `axes` (one name a dimension, None: never sharded).

    `init`: "matrix" (normal, 1/sqrt(in)), "residual" (the same, further divided by sqrt(2 layers): it writes to the
    residual stream), "embedding" (normal, 0.02), "one", "zero", "identity" (of the last two dimensions).

    The value is abstract: modules describe, and parameters live in the tree that `Model` is given.
    """
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes, init=init)
