"""From parameters back to a Hugging Face folder: the inverse of loading."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint.layout import scatter, source_shapes
from jaxserve.checkpoint.safetensors import Entry, write_folder
from jaxserve.models.model import Model, Params
from jaxserve.models.names import Layout, at
from jaxserve.models.registry import family
from jaxserve.quant import QTensor

MAX_FILE_BYTES = 5 * 2**30


def export_hf(model: Model, params: Params, folder: str | Path, dtype: str | None = None) -> None:
    """Writes config.json and model.safetensors (in shards above 5 GiB) that transformers and `load_model` read.

    `dtype`: of the stored weights, e.g. "bfloat16"; by default the parameters' own. config.json is the one that the
    model was made from, with its dtype set. Raises ValueError for quantized parameters: quantization loses what this
    layout stores.
    """
    folder = Path(folder)
    stored = jnp.dtype(dtype or model.dtype)
    entries = []
    for leaf in family(model.config.architecture).leaves(model.config):
        value = at(params, leaf.path)
        if isinstance(value, QTensor):
            raise ValueError(f"parameter {'.'.join(map(str, leaf.path))} is quantized: export the unquantized model")
        for number, shape in enumerate(source_shapes(leaf.layout, value.shape)):
            produce = partial(_source, leaf.layout, value, number)
            entries.append(Entry(leaf.sources[number], shape, stored, produce))
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, entries, MAX_FILE_BYTES)
    write_config(model, folder, stored.name)


def write_config(model: Model, folder: Path, dtype: str) -> None:
    """The config.json that the model was made from, saying that its weights are in `dtype`."""
    config: dict[str, Any] = json.loads(model.config.hf)
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")


def _source(layout: Layout, value: Any, number: int) -> np.ndarray:
    return scatter(layout, np.asarray(value), number)
