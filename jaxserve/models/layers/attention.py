"""Projections around attention. What attention reads and where KV lives is the caller's `attend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import DecoderConfig
from jaxserve.models.layers.norm import rms_norm
from jaxserve.models.layers.param import param
from jaxserve.models.layers.rope import Rotation, rotate
from jaxserve.quant import LinearContext, linear, linear_heads

Attend = Callable[[int, Any, jax.Array, jax.Array, jax.Array], tuple[Any, jax.Array]]
"""attend(layer, kv, q [T, heads, head_dim], k and v [T, kv_heads, head_dim]) -> (kv, o [T, heads, head_dim])"""


class Attention(nnx.Module):
    """q/k/v projection, qk-norm, RoPE, key basis, `attend`, output projection.

    Leaves: qkv [hidden, kv_heads * (group + 2) * head_dim] in blocks of one KV head (its query heads, k, v),
    o [heads * head_dim, hidden], qk_norm [2, head_dim] (q's weight, k's weight), biases where the model has them,
    key_basis [kv_heads, head_dim, head_dim], for the keys of a head and its queries.
    """

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype):
        columns = config.kv_heads * (config.group + 2) * config.head_dim
        rows = config.heads * config.head_dim
        self.config = config
        self.qkv = param((config.hidden, columns), ("embed", "heads"), dtype, "matrix")
        self.o = param((rows, config.hidden), ("heads", "embed"), dtype, "residual")
        if config.qkv_bias:
            self.qkv_bias = param((columns,), ("heads",), dtype, "zero")
        if config.o_bias:
            self.o_bias = param((config.hidden,), ("norm",), dtype, "zero")
        if config.qk_norm:
            start = "zero" if config.norm_offset else "one"
            self.qk_norm = param((2, config.head_dim), (None, None), dtype, start)
        if config.key_basis:
            square = (config.kv_heads, config.head_dim, config.head_dim)
            self.key_basis = param(square, ("heads", None, None), dtype, "identity")

    def __call__(
        self, x: jax.Array, turn: Rotation, layer: int, kv: Any, attend: Attend, ctx: LinearContext
    ) -> tuple[Any, jax.Array]:
        """x [T, hidden] -> (kv, [T, hidden])"""
        c = self.config
        bias = self.qkv_bias.get_value() if c.qkv_bias else None
        qkv = linear(x, self.qkv.get_value(), bias, ctx).reshape(-1, c.kv_heads, c.group + 2, c.head_dim)
        qk, v = qkv[:, :, :-1], qkv[:, :, -1]
        if c.qk_norm:
            q_weight, k_weight = self.qk_norm.get_value().astype(jnp.float32) + c.norm_offset
            qk = rms_norm(qk, jnp.stack([q_weight] * c.group + [k_weight]), c.rms_eps)
        qk = rotate(qk.reshape(-1, c.kv_heads * (c.group + 1), c.head_dim), turn).reshape(qk.shape)
        if c.key_basis:
            qk = linear_heads(qk, self.key_basis.get_value(), ctx)
        q, k = qk[:, :, :-1].reshape(-1, c.heads, c.head_dim), qk[:, :, -1]
        kv, o = attend(layer, kv, q, k, v)
        bias = self.o_bias.get_value() if c.o_bias else None
        return kv, linear(o.reshape(-1, c.heads * c.head_dim), self.o.get_value(), bias, ctx)
