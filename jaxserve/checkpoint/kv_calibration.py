"""The file of `jaxserve calibrate`: a basis of each head, and how many channels of it to keep. Knows no KV format.

A safetensors file: `keys` and `values` float32 [layers, kv_heads, head_dim, head_dim], and as metadata one JSON text
that names the model that they were made for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.models.basis import HeadBasis, fingerprint
from jaxserve.models.model import Model, Params

KIND = "jaxserve-kv-calibration-1"
_METADATA = "jaxserve"

Channels = tuple[tuple[int, int], ...]
"""By layer, the leading channels of a key and of a value that are kept."""


def share(channels: Sequence[tuple[int, int]], head_dim: int) -> float:
    """Of the channels that are kept."""
    return sum(map(sum, channels)) / (2 * head_dim * len(channels))


@dataclass(frozen=True)
class KVCalibration:
    """`model`: `models.basis.fingerprint` of the model, `name`: what people call it. `made`: how, for people: text,
    tokens, loss. `digest`: of the file."""

    basis: HeadBasis
    channels: Channels
    model: str
    name: str
    made: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def kept(self) -> float:
        """Share of the channels that is kept."""
        return share(self.channels, self.basis.keys.shape[-1])


def write_calibration(path: Path, calibration: KVCalibration) -> None:
    """Writes `path`; the same calibration gives the same bytes."""
    about = {
        "kind": KIND,
        "model": calibration.model,
        "name": calibration.name,
        "channels": calibration.channels,
        "made": calibration.made,
    }
    tensors = {
        name: np.ascontiguousarray(matrices, np.float32)
        for name, matrices in (("keys", calibration.basis.keys), ("values", calibration.basis.values))
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(save(tensors, {_METADATA: json.dumps(about, sort_keys=True)}))
    partial.replace(path)


def read_calibration(path: Path, model: Model, params: Params) -> KVCalibration:
    """The calibration of `model`, whose plain `params` tell it from others.

    Raises:
        CheckpointError: no such file, a damaged one, or one that was made for another model.
    """
    try:
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            if about.get("kind") != KIND:
                raise CheckpointError(f"{path} is no KV calibration of this version; `jaxserve calibrate` makes one")
            basis = HeadBasis(file.get_tensor("keys"), file.get_tensor("values"))
        found = KVCalibration(
            basis, tuple((int(k), int(v)) for k, v in about["channels"]), about["model"], about["name"], about["made"],
            digest,
        )  # fmt: skip
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}; `jaxserve calibrate` makes it"
        ) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged KV calibration: {error}") from error
    try:
        served = fingerprint(model, params)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if found.model != served:
        raise CheckpointError(
            f"{path} was made for another model ({found.name}): run `jaxserve calibrate` on the model that is served, "
            "its weights in float32 or bfloat16"
        )
    c = model.config
    if len(found.channels) != c.layers or not all(0 < n <= c.head_dim for pair in found.channels for n in pair):
        raise CheckpointError(f"{path} is a damaged KV calibration: it keeps {found.channels} of {c.head_dim} channels")
    return found
