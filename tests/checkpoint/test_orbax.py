"""Converted folders: the tree as it was, quantization included, and files beside it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoint import CheckpointError, load_model, read_generation_config, save_orbax


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_restored_as_saved(folder, tmp_path, quantization):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4], "top_k": 20}')
    model, params = load_model(folder, "float32", quantization)
    save_orbax(tmp_path / "converted", model, params, source=folder)
    again, restored = load_model(tmp_path / "converted", "auto")
    assert again == model
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert (tmp_path / "converted" / "tokenizer.json").exists()
    assert read_generation_config(tmp_path / "converted").eos_token_ids == (3, 4)


@pytest.fixture
def converted(trained, tmp_path):
    save_orbax(tmp_path / "converted", *trained)
    return tmp_path / "converted"


def test_quantization_is_decided_when_converting(converted):
    with pytest.raises(CheckpointError, match="quantization None, not int8"):
        load_model(converted, "float32", quantization="int8")


def test_dtype_may_be_another(converted, trained):
    model, params = load_model(converted, "bfloat16")
    assert model.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained[1]))


def test_does_not_overwrite(converted, trained):
    with pytest.raises(FileExistsError, match="holds a converted model already"):
        save_orbax(converted, *trained)


def test_another_version_is_refused(converted):
    manifest = converted / "jaxserve.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    with pytest.raises(CheckpointError, match="layout version 99"):
        load_model(converted, "auto")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_reported(converted):
    for file in (converted / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="params cannot be restored"):
        load_model(converted, "auto")


def test_another_shape_is_refused(converted):
    config = converted / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
    with pytest.raises(CheckpointError, match=r"layers\.\d\.mlp.* has shape"):
        load_model(converted, "auto")
