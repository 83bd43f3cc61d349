"""Rotary position embeddings, half-split layout: pair i of a head is (x[i], x[i + head_dim / 2])."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.config import LinearRope, Llama3Rope, Rope, YarnRope


class Rotation(NamedTuple):
    """cos and sin of the angles of each row: [T, 1, head_dim / 2] float32."""

    cos: jax.Array
    sin: jax.Array


def frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position of each pair [head_dim / 2] float32, and the factor on cos and sin."""
    base = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match rope:
        case LinearRope():
            return (base / rope.factor).astype(np.float32), 1.0
        case Llama3Rope():
            return _llama3(rope, base).astype(np.float32), 1.0
        case YarnRope():
            return _yarn(rope, base, head_dim).astype(np.float32), rope.attention_factor
    return base.astype(np.float32), 1.0


def _llama3(rope: Llama3Rope, base: np.ndarray) -> np.ndarray:
    turns = rope.original_max_position * base / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return keep * base + (1 - keep) * base / rope.factor


def _yarn(rope: YarnRope, base: np.ndarray, head_dim: int) -> np.ndarray:
    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    interpolate = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    return base / rope.factor * interpolate + base * (1 - interpolate)


def rotation(rope: Rope, head_dim: int, positions: jax.Array) -> Rotation:
    """The rotation of rows at `positions` [T] int32."""
    radians, factor = frequencies(rope, head_dim)
    angle = positions.astype(jnp.float32)[:, None, None] * radians
    # Products with 0 and 1, which are exact, so that cosines are computed once: XLA copies elementwise code into
    # whatever reads it, in every layer, but never a product.
    one = np.eye(head_dim // 2, dtype=np.float32) * np.float32(factor)
    return Rotation(
        jnp.matmul(jnp.cos(angle), one, precision="highest"), jnp.matmul(jnp.sin(angle), one, precision="highest")
    )


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """x [T, heads, head_dim] turned by `by`, computed in float32, in the dtype of x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * by.cos - second * by.sin, second * by.cos + first * by.sin), axis=-1)
    return turned.astype(x.dtype)
