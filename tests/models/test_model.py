"""The model's pure functions: groups, axes, schedules, initial weights, and bits that do not depend on the crowd."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import AttentionSpec, Model, model_config_from_hf
from jaxserve.models.dense_attention import causal_attention, dense_attend
from jaxserve.quant import LinearContext, QTensor, quantize
from jaxserve.types import KVGroup

GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
}


@pytest.fixture(scope="module")
def model():
    return Model.from_config(model_config_from_hf(GEMMA), "float32")


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@partial(jax.jit, static_argnames=("model", "ctx", "schedule"))
def run(model, params, tokens, ctx=LinearContext(), schedule=None):  # noqa: B008
    hidden, _ = model.forward(params, tokens, jnp.arange(len(tokens)), None, dense_attend(model), ctx, schedule)
    return model.logits(params, hidden, ctx)


def test_windowed_and_full_layers_are_two_kv_groups(model):
    assert model.kv_groups() == (
        KVGroup(layers=(0, 2), kv_heads=2, head_dim=16, window=8),
        KVGroup(layers=(1, 3), kv_heads=2, head_dim=16, window=None),
    )
    assert model.attention_spec(0) == AttentionSpec(256**-0.5, 8)
    assert model.attention_spec(1) == AttentionSpec(256**-0.5, None)


def test_axes_name_every_dimension(model, params):
    axes = model.logical_axes(params)
    jax.tree.map(lambda leaf, names: pytest.fail() if leaf.ndim != len(names) else None, params, axes)
    assert axes["layers"][0]["attention"]["qkv"] == ("embed", "heads")
    assert axes["embedding"]["table"] == ("vocab", "embed")


def test_axes_of_quantized_leaves(model, params):
    abstract = model.abstract_params("int8")
    axes = model.logical_axes(abstract)["layers"][1]["mlp"]["down"]
    assert (axes.codes, axes.scale) == (("mlp", "embed"), ("embed",))
    assert isinstance(abstract["layers"][1]["mlp"]["down"], QTensor)
    assert not isinstance(abstract["embedding"]["table"], QTensor)


def test_abstract_params_describe_real_ones(model, params):
    assert model.abstract_params() == jax.eval_shape(lambda: params)


def test_quantized_leaves_take_the_place_of_plain_ones(model, params):
    down = params["layers"][0]["mlp"]["down"]
    mlp = params["layers"][0]["mlp"] | {"down": quantize("int8", down)}
    mixed = params | {"layers": params["layers"] | {0: params["layers"][0] | {"mlp": mlp}}}
    tokens = np.arange(20)
    np.testing.assert_allclose(run(model, mixed, tokens), run(model, params, tokens), atol=0.05)


def test_schedule_is_data(model, params):
    tokens = np.arange(30)
    assert np.array_equal(run(model, params, tokens, schedule=(0, 1, 2, 3)), run(model, params, tokens))
    assert not np.allclose(run(model, params, tokens, schedule=(0, 3)), run(model, params, tokens), atol=1e-3)

    two = Model.from_config(model_config_from_hf(GEMMA | {"num_hidden_layers": 2}), "float32")
    first_two = params | {"layers": {i: params["layers"][i] for i in (0, 1)}}
    assert np.array_equal(run(model, params, tokens, schedule=(0, 1)), run(two, first_two, tokens))


def test_rows_have_the_same_bits_in_any_crowd(model, params):
    """Attention aside, whose rows the caller's `attend` keeps apart."""
    ctx = LinearContext(invariant_rows=64)

    @jax.jit
    def logits(tokens, positions):
        hidden, _ = model.forward(params, tokens, positions, None, lambda layer, kv, q, k, v: (kv, q), ctx)
        return model.logits(params, hidden, ctx)

    tokens, positions = np.arange(150) % 96, np.arange(150) * 3
    crowd = np.asarray(logits(tokens, positions))
    for count in (1, 2, 16, 65):
        assert np.array_equal(logits(tokens[:count], positions[:count]), crowd[:count])


def test_padding_rows_are_hidden_from_attend(model, params):
    tokens = np.arange(20)
    plain = run(model, params, tokens)
    np.testing.assert_allclose(run(model, params, tokens, ctx=LinearContext(invariant_rows=64)), plain, atol=1e-4)


def test_initial_weights_give_usable_logits(model, params):
    assert 0.05 < run(model, params, np.arange(40)).std() < 3


@pytest.mark.parametrize("spec", [AttentionSpec(0.3), AttentionSpec(0.3, 5), AttentionSpec(0.3, None, 2.0)])
@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_dense_attention_is_its_definition(spec, chunk):
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (19, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True))
    k64, v64 = (np.repeat(np.asarray(x, np.float64), 2, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", np.asarray(q, np.float64), k64) * spec.scale
    if spec.softcap:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    age = np.arange(19)[:, None] - np.arange(19)
    scores[:, (age < 0) | (age >= (spec.window or 19))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hqk,khd->qhd", weights, v64)
    ours = jax.jit(partial(causal_attention, spec=spec, chunk=chunk))(q, k, v)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
