"""A model in another basis is the same model; what cannot be rewritten is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import Model, model_config_from_hf
from jaxserve.models.basis import HeadBasis, change_basis, fingerprint, quantize_params
from jaxserve.models.dense_attention import dense_attend
from jaxserve.quant import LinearContext, QTensor, linear_heads

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "llama with biases": {"architectures": ["LlamaForCausalLM"], "attention_bias": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 5.0,
    },
}
TOKENS = np.arange(40)


def made(name: str) -> tuple[Model, Any]:
    """A model whose biases and norms are not those that training starts from."""
    model = Model.from_config(model_config_from_hf(SIZES | CASES[name]), "float32")
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0)))
    rng = np.random.default_rng(1)
    noisy = [np.asarray(leaf) + np.float32(0.3) * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return model, jax.tree.unflatten(tree, [jnp.asarray(leaf) for leaf in noisy])


def orthogonal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal(shape))[0].astype(np.float32)


def basis(model: Model, seed: int = 0) -> HeadBasis:
    c = model.config
    shape = (c.layers, c.kv_heads, c.head_dim, c.head_dim)
    return HeadBasis(orthogonal(*shape, seed=seed), orthogonal(*shape, seed=seed + 1))


@partial(jax.jit, static_argnames=("model", "ctx"))
def run(model: Model, params: Any, tokens: Any, ctx: LinearContext = LinearContext()) -> jax.Array:  # noqa: B008
    hidden, _ = model.forward(params, tokens, jnp.arange(len(tokens)), None, dense_attend(model), ctx)
    return model.logits(params, hidden, ctx)


def seen(model: Model, params: Any) -> list[list[np.ndarray]]:
    """q, k, v and o of each layer."""
    return [[np.asarray(x, np.float64) for x in layer] for layer in _seen(model, params)]


@partial(jax.jit, static_argnames="model")
def _seen(model: Model, params: Any) -> list[tuple[jax.Array, ...]]:
    found: list[tuple[jax.Array, ...]] = []
    plain = dense_attend(model)

    def attend(layer: int, kv: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
        kv, o = plain(layer, kv, q, k, v)
        found.append((q, k, v, o))
        return kv, o

    model.forward(params, TOKENS, TOKENS, None, attend)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_same_logits(name: str) -> None:
    model, params = made(name)
    logits = run(model, params, TOKENS)
    other = run(*change_basis(model, params, basis(model)), TOKENS)
    np.testing.assert_allclose(other, logits, atol=1e-5 * float(jnp.abs(logits).max()))


@pytest.mark.parametrize("name", CASES)
def test_heads_are_turned_and_nothing_else(name: str) -> None:
    """Keys and queries times the key basis after RoPE, values and what attention returns times the value basis."""
    model, params = made(name)
    b, c = basis(model), model.config
    before, after = seen(model, params), seen(*change_basis(model, params, b))
    for layer in range(c.layers):
        for x, y, turn in zip(before[layer], after[layer], (b.keys, b.keys, b.values, b.values), strict=True):
            per_head = np.repeat(turn[layer], x.shape[1] // c.kv_heads, axis=0).astype(np.float64)
            exact = np.einsum("thd,hde->the", x, per_head)
            np.testing.assert_allclose(y, exact, atol=2e-5 * np.abs(exact).max())


def test_folding_there_and_back_gives_the_weights(name: str = "llama with biases") -> None:
    model, params = made(name)
    b = basis(model)
    turned, there = change_basis(model, params, b)
    back = HeadBasis(b.keys.swapaxes(-1, -2), b.values.swapaxes(-1, -2))
    plain = jax.tree.map(lambda x: x, there)
    for layer in plain["layers"].values():
        del layer["attention"]["key_basis"]
    _, again = change_basis(model, plain, back)
    for layer, tree in params["layers"].items():
        for leaf in ("qkv", "qkv_bias", "o"):
            np.testing.assert_allclose(again["layers"][layer]["attention"][leaf], tree["attention"][leaf], atol=2e-6)
    with pytest.raises(ValueError, match="in a basis already"):
        change_basis(turned, there, b)


def test_every_leaf_is_described() -> None:
    model, params = made("qwen3")
    turned, other = change_basis(model, params, basis(model))
    assert turned.abstract_params() == jax.eval_shape(lambda: other)
    axes = turned.logical_axes(other)
    assert axes["layers"][0]["attention"]["key_basis"] == ("heads", None, None)
    start = turned.init(jax.random.key(0))["layers"][1]["attention"]["key_basis"]
    np.testing.assert_array_equal(start, np.broadcast_to(np.eye(32), (2, 32, 32)))


def test_quantizing_comes_after() -> None:
    model, params = made("qwen3")
    turned, other = change_basis(model, params, basis(model))
    codes = quantize_params(turned, other, "int8")
    assert isinstance(codes["layers"][0]["attention"]["o"], QTensor)
    exact = run(turned, other, TOKENS)
    np.testing.assert_allclose(run(turned, codes, TOKENS), exact, atol=0.1 * float(jnp.abs(exact).max()))
    quantized = quantize_params(model, params, "int8")
    for refuses in (lambda: change_basis(model, quantized, basis(model)), lambda: fingerprint(model, quantized)):
        with pytest.raises(ValueError, match="are quantized"):
            refuses()


def test_the_fingerprint_is_the_models_own() -> None:
    model, params = made("qwen3")
    own = fingerprint(model, params)
    assert fingerprint(Model.from_config(model.config, "bfloat16"), _as(params, jnp.bfloat16)) == own
    assert fingerprint(*made("llama with biases")) != own
    layer = params["layers"][1]
    changed = layer | {"attention": layer["attention"] | {"o": layer["attention"]["o"] * 1.02}}
    assert fingerprint(model, params | {"layers": params["layers"] | {1: changed}}) != own


def _as(params: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def test_what_is_no_basis_is_refused() -> None:
    model, params = made("qwen3")
    good = basis(model)
    with pytest.raises(ValueError, match="keys is not orthogonal"):
        HeadBasis(good.keys * 1.01, good.values)
    with pytest.raises(ValueError, match="values is not orthogonal"):
        HeadBasis(good.keys, np.full_like(good.values, np.nan))
    with pytest.raises(ValueError, match="must be"):
        HeadBasis(good.keys[0], good.values)
    with pytest.raises(ValueError, match="is not one of"):
        change_basis(model, params, HeadBasis(good.keys[:1], good.values[:1]))


def test_rows_of_a_head_product_have_the_same_bits_in_any_crowd() -> None:
    x = jax.random.normal(jax.random.key(0), (150, 2, 3, 32))
    w = jnp.asarray(orthogonal(2, 32, 32))
    exact = np.einsum("thni,hio->thno", np.asarray(x, np.float64), np.asarray(w, np.float64))
    np.testing.assert_allclose(linear_heads(x, w), exact, atol=1e-5)
    product = jax.jit(partial(linear_heads, ctx=LinearContext(invariant_rows=64)))
    crowd = product(x, w)
    np.testing.assert_allclose(crowd, exact, atol=1e-5)
    for count in (1, 2, 65):
        assert np.array_equal(product(x[:count], w), crowd[:count])
