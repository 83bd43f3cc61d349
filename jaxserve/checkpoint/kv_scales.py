"""The calibrated scales of an fp8 KV cache, where a checkpoint brings them. Knows no KV format."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from jaxserve.checkpoint import orbax_store
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.safetensors import TensorFolder

_NAME = re.compile(r"layers\.(\d+)\.self_attn\.(?:([kv])_scale|(?:k_proj\.(k)|v_proj\.(v))_scale)$")
"""`self_attn.k_scale`, as compressed-tensors writes it, or `self_attn.k_proj.k_scale`, as ModelOpt does."""


def is_kv_scale(name: str) -> bool:
    """Whether a tensor of that name is such a scale."""
    return _NAME.search(name) is not None


def read_kv_scales(folder: Path, layers: int) -> tuple[tuple[float, float], ...]:
    """(k_scale, v_scale) of each layer, a number being scale * code; empty if the checkpoint has none.

    Raises CheckpointError, naming the tensor, for a scale that is missing or no positive number.
    """
    if orbax_store.is_orbax(folder):
        return ()
    tensors = TensorFolder(folder)
    found: dict[tuple[int, str], float] = {}
    for name in tensors.names:
        if match := _NAME.search(name):
            value = np.asarray(tensors.view(name), np.float32).reshape(-1)
            if value.size != 1 or not math.isfinite(value[0]) or value[0] <= 0:
                raise CheckpointError(f"{tensors.file_of(name)}: tensor {name!r} must be one positive number")
            found[int(match[1]), match[2] or match[3] or match[4]] = float(value[0])
    if not found:
        return ()
    for layer in range(layers):
        for half in "kv":
            if (layer, half) not in found:
                raise CheckpointError(f"{folder}: layer {layer} has no {half}_scale, but others have KV scales")
    return tuple((found[layer, "k"], found[layer, "v"]) for layer in range(layers))
