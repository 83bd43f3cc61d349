"""The parameters of a model in the formats that the kernels of CPUs read. Values stay what they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.model import Model, Params
from jaxserve.quant import QTensor, weight_format
from pallas_kernels.native.build import compiler


def native_params(model: Model, params: Params) -> Params:
    """Matrices of the layers and of the head as `panels`, a tied embedding as a `table`; where there is a C compiler,
    and of plain float32 weights: others are returned as they are.

    `params` is taken apart on the way, so that at no time two copies of the weights are held.
    """
    if compiler() is None or model.dtype != jnp.float32 or _quantized(params):
        return params
    layers, embedding = params["layers"], params["embedding"]
    for i, like in model.abstract_params("panels")["layers"].items():
        layers[i] = jax.tree.map(
            lambda value, like: _as("panels", value) if isinstance(like, QTensor) else value, layers[i], like
        )
    if model.config.tie_embeddings:
        embedding["table"] = _as("table", embedding["table"].T)
    else:
        embedding["head"] = _as("panels", embedding["head"])
    return params


def _quantized(params: Params) -> bool:
    # Not a local of the caller: a list of the leaves would keep every weight alive beside its new form.
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return any(isinstance(leaf, QTensor) for leaf in leaves)


def _as(name: str, weight: jax.Array) -> Any:
    return jax.tree.map(jnp.asarray, weight_format(name).quantize(np.asarray(weight)))
