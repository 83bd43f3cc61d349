"""A basis for the keys and values of each KV head: the same model, written so that leading channels carry the most.

With orthogonal matrices R and S of a KV head, q and k become q R and k R after RoPE, which leaves every score as it is
(RoPE does not commute with R, so R cannot be folded into the projections), v becomes v S, folded into the value
projection, and the output projection of the head's queries begins with S^T. Nothing is lost, up to rounding: what a KV
cache then leaves out of a head is its business. Knows no KV cache and no calibration.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.config import DecoderConfig
from jaxserve.models.model import Model, Params
from jaxserve.quant import QTensor, weight_format

ORTHOGONAL = 1e-3
"""How far R R^T may be from the identity, in its largest entry."""


@dataclass(frozen=True)
class HeadBasis:
    """`keys`, `values`: float32 [layers, kv_heads, head_dim, head_dim]; column j of a matrix is channel j.

    Raises:
        ValueError: matrices that are not orthogonal.
    """

    keys: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        for name, matrices in (("keys", self.keys), ("values", self.values)):
            if matrices.ndim != 4 or matrices.shape[-1] != matrices.shape[-2]:
                raise ValueError(f"the basis of {name} must be [layers, kv_heads, head_dim, head_dim]")
            off = np.abs(matrices @ matrices.swapaxes(-1, -2) - np.eye(matrices.shape[-1])).max()
            if not off <= ORTHOGONAL:
                raise ValueError(f"the basis of {name} is not orthogonal: off by {off:.2g}")


def change_basis(model: Model, params: Params, basis: HeadBasis) -> tuple[Model, Params]:
    """The same model in `basis`. `params` must be plain: codes of a quantized matrix cannot be multiplied exactly.

    Raises:
        ValueError: a basis of other sizes, quantized weights, a model that has a basis already.
    """
    c = model.config
    if c.key_basis:
        raise ValueError("this model is written in a basis already")
    wanted = (c.layers, c.kv_heads, c.head_dim, c.head_dim)
    if basis.keys.shape != wanted or basis.values.shape != wanted:
        raise ValueError(f"a basis of {basis.keys.shape} and {basis.values.shape} is not one of {wanted}, as needed")
    layers = {}
    for layer, tree in params["layers"].items():
        attention = tree["attention"]
        if isinstance(attention["qkv"], QTensor):
            raise ValueError("the weights are quantized; a basis can only be folded into the ones that they were")
        values = jnp.asarray(basis.values[layer])
        folded = {
            name: _fold_values(attention[name], values, c) for name in ("qkv", "qkv_bias") if name in attention
        } | {
            "o": _fold_output(attention["o"], values, c),
            "key_basis": jnp.asarray(basis.keys[layer], model.dtype),
        }
        layers[layer] = tree | {"attention": attention | folded}
    return Model.from_config(replace(c, key_basis=True), model.dtype), params | {"layers": layers}


@partial(jax.jit, static_argnums=2)
def _fold_values(leaf: jax.Array, values: jax.Array, config: DecoderConfig) -> jax.Array:
    """The columns of v in qkv [hidden, columns] or its bias [columns], times `values` [kv_heads, in, out]."""
    c = config
    blocks = leaf.astype(jnp.float32).reshape(*leaf.shape[:-1], c.kv_heads, c.group + 2, c.head_dim)
    v = jnp.einsum("...hi,hio->...ho", blocks[..., -1, :], values, precision="highest")
    return blocks.at[..., -1, :].set(v).reshape(leaf.shape).astype(leaf.dtype)


@partial(jax.jit, static_argnums=2)
def _fold_output(leaf: jax.Array, values: jax.Array, config: DecoderConfig) -> jax.Array:
    """`values`^T times the rows of o [heads * head_dim, hidden] that belong to the queries of each KV head."""
    c = config
    rows = leaf.astype(jnp.float32).reshape(c.kv_heads, c.group, c.head_dim, -1)
    folded = jnp.einsum("hio,hgin->hgon", values, rows, precision="highest")
    return folded.reshape(leaf.shape).astype(leaf.dtype)


def quantize_params(model: Model, params: Params, name: str) -> Params:
    """Plain `params` with the matrices of the layers in the weight format called `name`."""

    def leaf(value: jax.Array, like: Any) -> Any:
        return weight_format(name).quantize(value) if isinstance(like, QTensor) else value

    return jax.tree.map(leaf, params, model.abstract_params(name))


def fingerprint(model: Model, params: Params) -> str:
    """What tells this model from others, before its basis is changed: sizes, positions and a few rows of its weights.

    Rows are taken as bfloat16, so it does not depend on whether a checkpoint was loaded as float32 or bfloat16.
    """
    c = model.config
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((c.architecture, c.hidden, c.layers, c.heads, c.kv_heads, c.head_dim)).encode())
    digest.update(repr((c.rope, c.window_rope, c.qk_norm, c.windows)).encode())
    for layer in range(c.layers):
        attention = params["layers"][layer]["attention"]
        if isinstance(attention["qkv"], QTensor):
            raise ValueError("the weights are quantized already: calibrate and serve the ones that they were made of")
        for name in ("qkv", "o"):
            rows = np.asarray(attention[name][:: max(c.hidden // 4, 1)].astype(jnp.bfloat16))
            digest.update(rows.tobytes())
    return digest.hexdigest()
