"""Loading Hugging Face folders: values, shards, quantization, placement, and errors that name what is wrong."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoint import CheckpointError, export_hf, load_model, resolve
from jaxserve.checkpoint import export as export_module
from jaxserve.models import Model, model_config_from_hf
from jaxserve.quant import QTensor, dequantize
from tests.checkpoint.conftest import HF


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def edit(folder, change):
    """Rewrites model.safetensors with the safetensors package after `change(tensors)`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_export_and_load_are_inverse(trained, folder):
    model, params = load_model(folder, "float32")
    assert model == trained[0]
    assert_same(params, trained[1])


def test_exported_files_are_what_the_safetensors_package_reads(trained, folder):
    tensors = load_file(folder / "model.safetensors")
    attention = trained[1]["layers"][1]["attention"]
    o = tensors["model.layers.1.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(o.T, attention["o"])
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert q.shape == (64, 48)
    np.testing.assert_array_equal(q[:32].T, attention["qkv"][:, :32])
    np.testing.assert_array_equal(q[32:].T, attention["qkv"][:, 64:96])


def test_shards_and_their_index(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_FILE_BYTES", 20_000)
    export_hf(*trained, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(load_model(tmp_path, "float32")[1], trained[1])


@pytest.mark.parametrize(("stored", "loaded"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "auto")])
def test_dtypes_convert(trained, tmp_path, stored, loaded):
    export_hf(*trained, tmp_path, dtype=stored)
    model, params = load_model(tmp_path, loaded)
    expected = jnp.dtype(stored if loaded == "auto" else loaded)
    assert model.dtype == expected
    assert_same(params, jax.tree.map(lambda x: x.astype(stored).astype(expected), trained[1]))


def test_int8_is_quantized_while_loading(trained, folder):
    model, params = load_model(folder, "float32", quantization="int8")
    assert jax.eval_shape(lambda: params) == model.abstract_params("int8")
    qkv = params["layers"][0]["attention"]["qkv"]
    assert isinstance(qkv, QTensor)
    exact = np.asarray(trained[1]["layers"][0]["attention"]["qkv"])
    assert np.abs(np.asarray(dequantize(qkv)) - exact).max() <= 0.51 * np.asarray(qkv.scale).max()
    assert_same(params["embedding"], trained[1]["embedding"])


SHARDED = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxserve.checkpoint import load_model
mesh = Mesh(np.array(jax.devices()), ("x",))
for quantization in (None, "int8"):
    model, whole = load_model(sys.argv[1], "float32", quantization)
    axes = model.logical_axes(whole)
    place = lambda names: NamedSharding(mesh, PartitionSpec(*("x" if n in ("heads", "mlp") else None for n in names)))
    shardings = jax.tree.map(place, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    _, params = load_model(sys.argv[1], "float32", quantization, shardings)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), params, whole))
    down = jax.tree.leaves(params["layers"][0]["mlp"]["down"])[0]
    assert down.addressable_shards[0].data.shape == (40, 48), down.sharding
print("same")
"""


def test_shardings_place_each_part(folder):
    flags = "--xla_force_host_platform_device_count=2"
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SHARDED, folder], env=env, capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr


def test_tensors_that_carry_nothing_are_skipped(folder, trained):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    edit(folder, add)
    assert_same(load_model(folder, "float32")[1], trained[1])


def test_missing_tensor(folder):
    edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* is missing"):
        load_model(folder, "float32")


def test_unexpected_tensor(folder):
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}))
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        load_model(folder, "float32")


def test_wrong_shape(folder):
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(47, np.float32)}))
    with pytest.raises(CheckpointError, match=r"sors: tensor 'model\.norm\.weight' has shape \[47\].*\[48\]"):
        load_model(folder, "float32")


def test_weights_that_are_quantized_already(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: np.ones((48, 80), np.int8)}))
    with pytest.raises(CheckpointError, match=f"{name}.*int8"):
        load_model(folder, "float32")


@pytest.mark.parametrize("keep", [0, 4, 60, 5000, -1])
def test_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_model(folder, "float32")


@pytest.mark.parametrize("header", [b"not json", b"[1]", b'{"a": {"dtype": "F32"}}'])
def test_damaged_header(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has a damaged safetensors header"):
        load_model(folder, "float32")


def test_missing_shard(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_FILE_BYTES", 20_000)
    export_hf(*trained, tmp_path)
    (tmp_path / "model-00002-of-00007.safetensors").unlink(missing_ok=True)
    lost = next(iter(sorted(tmp_path.glob("model-*.safetensors"))))
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name} is missing"):
        load_model(tmp_path, "float32")


def test_index_that_names_a_tensor_its_shard_lacks(folder):
    index = {"weight_map": {"model.unheard.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has no tensor 'model\.unheard\.weight'"):
        load_model(folder, "float32")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(folder, "float32")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "config.json does not exist"),
        ("{", "config.json"),
        ("[]", "wrong type"),
        (json.dumps(HF | {"num_attention_heads": "4"}), "wrong type"),
        (json.dumps(HF | {"architectures": ["FooForCausalLM"]}), "FooForCausalLM"),
    ],
)
def test_config_errors_name_the_file(folder, text, words):
    file = folder / "config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(CheckpointError, match="config.json") as error:
        load_model(folder, "float32")
    assert words in str(error.value)


def test_export_writes_the_config_it_was_read_from(folder):
    written = json.loads((folder / "config.json").read_text())
    assert written == HF | {"dtype": "float32"}
    assert model_config_from_hf(written) == model_config_from_hf(HF)


def test_export_refuses_quantized_parameters(folder, tmp_path):
    model, params = load_model(folder, "float32", quantization="int8")
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.qkv is quantized"):
        export_hf(model, params, tmp_path / "out")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nor/this", "a/b/c", "~/missing"])
def test_paths_that_are_no_folder(name):
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve(name)


def test_hub_id_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'nobody/nothing' is no local folder, and could not be fetched"):
        resolve("nobody/nothing")


def test_language_model_inside_a_multimodal_checkpoint(tmp_path):
    text = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    alone = Model.from_config(model_config_from_hf({"architectures": ["Gemma3ForCausalLM"], **text}), "float32")
    params = alone.init(jax.random.key(1))
    export_hf(alone, params, tmp_path)
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))

    def nest(tensors):
        for name in list(tensors):
            tensors["language_model." + name] = tensors.pop(name)
        tensors["vision_tower.encoder.weight"] = np.ones(3, np.float32)

    edit(tmp_path, nest)
    model, loaded = load_model(tmp_path, "float32")
    assert model == alone
    assert_same(loaded, params)
