"""From a folder to a model and its parameters, leaf by leaf: no second copy of the weights is held in host memory."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint import orbax_store
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.kv_scales import is_kv_scale
from jaxserve.checkpoint.layout import Index, gather, source_shapes
from jaxserve.checkpoint.safetensors import TensorFolder
from jaxserve.checkpoint.source import resolve
from jaxserve.models.config import DecoderConfig
from jaxserve.models.model import Model, Params
from jaxserve.models.names import Leaf, at
from jaxserve.models.registry import Family, family, model_config_from_hf
from jaxserve.quant import QTensor, weight_format


def read_config(path: str | Path) -> DecoderConfig:
    """The configuration of a local folder. CheckpointError names the file and what is wrong with it."""
    file = Path(path) / "config.json"
    try:
        return model_config_from_hf(json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist: a model folder needs a config.json") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(f"{file} has a field of the wrong type or value: {error!r}") from error


def load_model(
    path: str | Path, dtype: Any, quantization: str | None = None, shardings: Params | None = None
) -> tuple[Model, Params]:
    """Loads a Hugging Face folder, a folder that `save_orbax` wrote, or a hub id.

    Args:
        dtype: of parameters and activations; "auto" takes the checkpoint's own.
        quantization: name of a weight format (see `jaxserve.quant`); layer matrices are quantized as they are read.
        shardings: tree of jax.sharding.Sharding of the shape of `Model.abstract_params(quantization)`; None puts
            everything on the default device.

    Raises:
        CheckpointError: names the file, the tensor and the fault; the unsupported field or architecture.
    """
    folder = resolve(path)
    config = read_config(folder)
    if orbax_store.is_orbax(folder):
        dtype, quantization = orbax_store.agree(folder, dtype, quantization)
    model = Model.from_config(config, config.stored_dtype if dtype == "auto" else dtype)
    abstract = model.abstract_params(quantization)
    if shardings is None:
        shardings = jax.tree.map(lambda _: None, abstract)
    if orbax_store.is_orbax(folder):
        return model, orbax_store.restore(folder, abstract, shardings)
    return model, _load_safetensors(folder, model, abstract, shardings)


def _load_safetensors(folder: Path, model: Model, abstract: Params, shardings: Params) -> Params:
    tensors = TensorFolder(folder)
    source = family(model.config.architecture)
    leaves = source.leaves(model.config)
    stored = _stored_names(source, tensors)
    _check_names(folder, model.config, source, leaves, stored)
    plain = model.abstract_params()
    sources = {leaf: _views(leaf, at(plain, leaf.path).shape, tensors, stored) for leaf in leaves}

    def load(leaf: Leaf) -> jax.Array | QTensor:
        shape = at(plain, leaf.path).shape
        value = _load_leaf(leaf, sources[leaf], shape, at(abstract, leaf.path), at(shardings, leaf.path))
        for name in leaf.sources:
            tensors.release(stored[name])
        return value

    # Copies of numpy are single-threaded and release the interpreter lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        loaded = dict(zip(leaves, pool.map(load, leaves), strict=True))
    params: Params = {}
    for leaf, value in loaded.items():
        _place(params, leaf.path, value)
    return params


def _load_leaf(
    leaf: Leaf, sources: list[np.ndarray], shape: tuple[int, ...], like: Any, sharding: Any
) -> jax.Array | QTensor:
    whole = (slice(None),) * len(shape)
    if isinstance(like, QTensor):
        # A scale covers its whole column, so a quantized matrix passes through the host in one piece, one at a time.
        values = gather(leaf.layout, sources, shape, whole, np.dtype(np.float32))
        codes = weight_format(like.format).quantize(values)
        return jax.tree.map(_put, codes, sharding or QTensor(None, None, like.format))

    def read(index: Index | None) -> np.ndarray:
        return gather(leaf.layout, sources, shape, index or whole, np.dtype(like.dtype))

    return _put(read(whole), None) if sharding is None else jax.make_array_from_callback(shape, sharding, read)


def _put(value: np.ndarray, sharding: Any) -> jax.Array:
    return jnp.asarray(value) if sharding is None else jax.device_put(value, sharding)


def _stored_names(source: Family, tensors: TensorFolder) -> dict[str, str]:
    """Canonical name -> name in the files. Tensors of other modalities are left out."""
    stored = {}
    for name in tensors.names:
        if name.startswith(source.skipped):
            continue
        canonical = name
        for old, new in source.renames:
            if name.startswith(old):
                canonical = new + name.removeprefix(old)
                break
        stored[canonical] = name
    return stored


def _check_names(
    folder: Path, config: DecoderConfig, source: Family, leaves: tuple[Leaf, ...], stored: dict[str, str]
) -> None:
    wanted = {name for leaf in leaves for name in leaf.sources}
    missing = sorted(wanted - stored.keys())
    if missing:
        raise CheckpointError(f"{folder}: tensor {missing[0]!r} is missing{_others(missing)}")
    extra = sorted(name for name in stored.keys() - wanted if not _harmless(name, config))
    if extra:
        raise CheckpointError(
            f"{folder}: unexpected tensor {extra[0]!r}{_others(extra)}: config.json describes a model without it"
        )


def _harmless(name: str, config: DecoderConfig) -> bool:
    """Buffers that old checkpoints stored, the head of a model that ties it to the embedding, and what `read_kv_scales`
    reads."""
    if name.endswith(".rotary_emb.inv_freq") or is_kv_scale(name):
        return True
    return name == "lm_head.weight" and config.tie_embeddings


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _views(leaf: Leaf, shape: tuple[int, ...], tensors: TensorFolder, stored: dict[str, str]) -> list[np.ndarray]:
    views = [tensors.view(stored[name]) for name in leaf.sources]
    for name, view, expected in zip(leaf.sources, views, source_shapes(leaf.layout, shape), strict=True):
        if view.shape != expected:
            raise CheckpointError(
                f"{tensors.file_of(stored[name])}: tensor {stored[name]!r} has shape {list(view.shape)}, "
                f"config.json asks for {list(expected)}"
            )
        if not jnp.issubdtype(view.dtype, jnp.floating):
            raise CheckpointError(
                f"{tensors.file_of(stored[name])}: tensor {stored[name]!r} is {view.dtype}: "
                "checkpoints that are quantized already are not supported"
            )
    return views


def _place(tree: Params, path: tuple[str | int, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
