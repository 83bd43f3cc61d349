"""Small folders in Hugging Face layout, written by the project's own export."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jaxserve.checkpoint import export_hf
from jaxserve.models import Model, model_config_from_hf

HF = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def trained():
    """(model, params) in float32, every leaf random."""
    model = Model.from_config(model_config_from_hf(HF), "float32")
    leaves, tree = jax.tree.flatten(model.abstract_params())
    keys = jax.random.split(jax.random.key(3), len(leaves))
    values = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return model, jax.tree.unflatten(tree, values)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """The model of `trained` as a Hugging Face folder that a test may damage."""
    path = tmp_path / "model"
    export_hf(*trained, path)
    return path
