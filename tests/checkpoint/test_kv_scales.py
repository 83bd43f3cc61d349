"""KV scales in a checkpoint: read in both spellings, refused when they cannot be honoured, no obstacle to loading."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoint import CheckpointError, load_model
from jaxserve.checkpoint.kv_scales import read_kv_scales

ATTENTION = "model.layers.{}.self_attn."


def add(folder: Path, scales: dict[str, float | list[float]]) -> None:
    file = folder / "model.safetensors"
    extra = {name: np.array(value, np.float32) for name, value in scales.items()}
    save_file(load_file(file) | extra, file)


@pytest.mark.parametrize("spelling", ["{}_scale", "{0}_proj.{0}_scale"])
def test_scales_of_every_layer(folder: Path, spelling: str) -> None:
    values = {(layer, half): 0.25 + layer + (half == "v") / 2 for layer in range(2) for half in "kv"}
    add(folder, {ATTENTION.format(layer) + spelling.format(half): [x] for (layer, half), x in values.items()})
    assert read_kv_scales(folder, 2) == ((0.25, 0.75), (1.25, 1.75))
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    (folder / "config.json").write_text(json.dumps(config))
    load_model(folder, "float32")


def test_none(folder: Path) -> None:
    assert read_kv_scales(folder, 2) == ()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), [1.0, 2.0]])
def test_a_scale_is_one_positive_number(folder: Path, bad: float | list[float]) -> None:
    add(folder, {ATTENTION.format(0) + "k_scale": bad})
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_scale' must be one positive number"):
        read_kv_scales(folder, 2)


def test_a_missing_scale_is_named(folder: Path) -> None:
    add(folder, {ATTENTION.format(0) + "k_scale": 1.0, ATTENTION.format(0) + "v_scale": 1.0})
    with pytest.raises(CheckpointError, match="layer 1 has no k_scale"):
        read_kv_scales(folder, 2)


def test_quantized_weights_are_still_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"config_groups": {"group_0": {}}, "kv_cache_scheme": {"num_bits": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config"):
        load_model(folder, "float32")
