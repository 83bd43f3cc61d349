"""The gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import DecoderConfig
from jaxserve.models.layers.fused import mlp_blocks
from jaxserve.models.layers.param import param
from jaxserve.quant import LinearContext, linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)).

    Leaves: gate_up [hidden, 2 * intermediate] in `mlp_blocks` blocks (gate columns, up columns), down
    [intermediate, hidden], biases where the model has them.
    """

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype):
        self.config = config
        self.gate_up = param((config.hidden, 2 * config.intermediate), ("embed", "mlp"), dtype, "matrix")
        self.down = param((config.intermediate, config.hidden), ("mlp", "embed"), dtype, "residual")
        if config.mlp_bias:
            self.gate_up_bias = param((2 * config.intermediate,), ("mlp",), dtype, "zero")
            self.down_bias = param((config.hidden,), ("norm",), dtype, "zero")

    def __call__(self, x: jax.Array, ctx: LinearContext) -> jax.Array:
        """x [T, hidden] -> [T, hidden]"""
        c = self.config
        blocks = mlp_blocks(c)
        bias = self.gate_up_bias.get_value() if c.mlp_bias else None
        both = linear(x, self.gate_up.get_value(), bias, ctx).reshape(-1, blocks, 2, c.intermediate // blocks)
        inner = ACTIVATIONS[c.activation](both[:, :, 0]) * both[:, :, 1]
        bias = self.down_bias.get_value() if c.mlp_bias else None
        return linear(inner.reshape(-1, c.intermediate), self.down.get_value(), bias, ctx)
