"""Projections around attention. What attention reads and where KV lives is the caller's `attend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import DecoderConfig
from jaxserve.models.layers import native
from jaxserve.models.layers.norm import RMSNorm, rms_norm
from jaxserve.models.layers.param import param
from jaxserve.models.layers.rope import rotate
from jaxserve.models.layers.rows import Rows
from jaxserve.quant import LinearContext, linear, linear_heads

Attend = Callable[[int, Any, jax.Array, jax.Array, jax.Array], tuple[Any, jax.Array]]
"""attend(layer, kv, q [T, heads, head_dim], k and v [T, kv_heads, head_dim]) -> (kv, o [T, heads, head_dim])"""


class Attention(nnx.Module):
    """Norm, q/k/v projection, qk-norm, RoPE, key basis, `attend`; the output projection is a step of its own.

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
        self, x: jax.Array, norm: RMSNorm, rows: Rows, layer: int, kv: Any, attend: Attend, ctx: LinearContext
    ) -> tuple[Any, jax.Array]:
        """The residual stream x [T, hidden] -> (kv, what the heads found [T, heads * head_dim])."""
        c = self.config
        q, k, v = native.project_heads(x, norm, self, rows) or self.heads(norm(x), rows, ctx)
        if c.key_basis:
            q, k = self._in_basis(q, k, ctx)
        kv, o = attend(layer, kv, q, k, v)
        return kv, o.reshape(-1, c.heads * c.head_dim)

    def heads(self, x: jax.Array, rows: Rows, ctx: LinearContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalized x [T, hidden] -> q [T, heads, head_dim], k and v [T, kv_heads, head_dim]."""
        c = self.config
        bias = self.qkv_bias.get_value() if c.qkv_bias else None
        qkv = linear(x, self.qkv.get_value(), bias, ctx).reshape(-1, c.kv_heads, c.group + 2, c.head_dim)
        qk, v = qkv[:, :, :-1], qkv[:, :, -1]
        if c.qk_norm:
            q_weight, k_weight = self.qk_norm.get_value().astype(jnp.float32) + c.norm_offset
            qk = rms_norm(qk, jnp.stack([q_weight] * c.group + [k_weight]), c.rms_eps)
        qk = rotate(qk.reshape(-1, c.kv_heads * (c.group + 1), c.head_dim), rows.turn).reshape(qk.shape)
        return qk[:, :, :-1].reshape(-1, c.heads, c.head_dim), qk[:, :, -1], v

    def output(self, heads: jax.Array, ctx: LinearContext) -> jax.Array:
        """[T, heads * head_dim] -> [T, hidden]"""
        bias = self.o_bias.get_value() if self.config.o_bias else None
        return linear(heads, self.o.get_value(), bias, ctx)

    def _in_basis(self, q: jax.Array, k: jax.Array, ctx: LinearContext) -> tuple[jax.Array, jax.Array]:
        c = self.config
        qk = jnp.concatenate([q.reshape(-1, c.kv_heads, c.group, c.head_dim), k[:, :, None]], axis=2)
        qk = linear_heads(qk, self.key_basis.get_value(), ctx)
        return qk[:, :, :-1].reshape(q.shape), qk[:, :, -1]
