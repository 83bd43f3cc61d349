"""The halves of a pre-norm layer by the kernels of CPUs, where its parameters are in the order that those read.

None of what is here defines a layer: what a kernel does not take, the modules compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxserve.models.layers.fused import mlp_blocks
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.rows import Rows
from jaxserve.quant import Panels, QTensor
from pallas_kernels.native import layers as kernels

if TYPE_CHECKING:
    from jaxserve.models.layers.attention import Attention
    from jaxserve.models.layers.mlp import GatedMLP


def project_heads(
    x: jax.Array, norm: RMSNorm, attention: Attention, rows: Rows
) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """What `Attention.heads` returns, or None."""
    c = attention.config
    weights = _panels(x, attention.qkv)
    if weights is None:
        return None
    (qkv,) = weights
    cos, sin = (angle.reshape(x.shape[0], -1) for angle in rows.turn)
    bias = attention.qkv_bias.get_value() if c.qkv_bias else None
    qk_norm = attention.qk_norm.get_value() + c.norm_offset if c.qk_norm else None
    return kernels.project_heads(
        x, rows.live, rows.read, norm.scale(), norm.eps, qkv, bias, qk_norm, cos, sin, (c.heads, c.kv_heads)
    )


def feed_forward(
    x: jax.Array, heads: jax.Array, attention: Attention, norm: RMSNorm, mlp: GatedMLP, rows: Rows
) -> jax.Array | None:
    """y + mlp(norm(y)) of y = x + the projection of attention's `heads`; or None."""
    c = attention.config
    weights = _panels(x, attention.o, mlp.gate_up, mlp.down)
    if weights is None or c.o_bias or c.mlp_bias or c.activation != "silu":
        return None
    out, gate_up, down = weights
    block = c.intermediate // mlp_blocks(c)
    return kernels.feed_forward(x, rows.read, heads, out, norm.scale(), norm.eps, gate_up, down, block)


def _panels(x: jax.Array, *params: Any) -> list[jax.Array] | None:
    """The panels of these parameters, if x and all of them are for the kernels."""
    weights = [each.get_value() for each in params]
    fit = x.dtype == jnp.float32 and all(isinstance(w, QTensor) and w.format == Panels.name for w in weights)
    return [w.codes for w in weights] if fit else None
