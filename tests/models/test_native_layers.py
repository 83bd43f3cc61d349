"""Layers by the kernels of CPUs are the layers of the modules; rows have bits of their own, and padding is left out."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import Model, model_config_from_hf
from jaxserve.models.native import native_params
from pallas_kernels.native import build

SIZES = {
    "vocab_size": 96,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "norms of queries and keys": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
    "biases": {"architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 3, "num_key_value_heads": 1},
    "one query a key, wide heads": {"architectures": ["LlamaForCausalLM"], "head_dim": 128, "num_key_value_heads": 4},
}

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def model(request: pytest.FixtureRequest) -> Model:
    return Model.from_config(model_config_from_hf(SIZES | MODELS[request.param]), "float32")


def draw_params(model: Model, stored: str) -> Any:
    """Every leaf drawn, also weights of norms and biases, and rounded to `stored`."""
    leaves, tree = jax.tree.flatten(model.abstract_params())
    draw = np.random.default_rng(0)
    values = [draw.normal(size=leaf.shape, scale=leaf.shape[0] ** -0.5) + (leaf.ndim == 1) for leaf in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(v, stored).astype(jnp.float32) for v in values])


@partial(jax.jit, static_argnames="model")
def run(model: Model, params: Any, tokens: Any, positions: Any, read: Any = None) -> tuple[jax.Array, Any]:
    """The hidden rows, and q, k, v of each layer. Heads attend to nothing but their own row."""

    def attend(layer: int, kv: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
        group = q.shape[1] // v.shape[1]
        return [*kv, (q, k, v)], q * jnp.repeat(k + v, group, axis=1)

    return model.forward(params, tokens, positions, [], attend, read=read)


@pytest.mark.parametrize(("stored", "count"), [("float32", 5), ("bfloat16", 1), ("bfloat16", 131)])
def test_they_compute_what_the_modules_do(model: Model, stored: str, count: int) -> None:
    tokens = jnp.arange(count) % 96
    args = (tokens, tokens * 3)
    exact, heads = run(model, draw_params(model, stored), *args)
    params = native_params(model, draw_params(model, stored))
    got, native_heads = run(model, params, *args)
    for a, b in zip(jax.tree.leaves((got, native_heads)), jax.tree.leaves((exact, heads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))
    program = run.lower(model, params, *args).as_text()
    assert "jaxserve_project_heads" in program
    assert "jaxserve_feed_forward" in program


def test_what_is_not_wanted_is_left_out_and_nothing_else_changes(model: Model) -> None:
    params = native_params(model, draw_params(model, "bfloat16"))
    draw = np.random.default_rng(1)
    tokens = jnp.asarray(draw.integers(0, 96, 150))
    live, read = draw.random((2, 150)) < 0.5
    live[:40], live[40:64], live[64:128], read[64:100] = True, False, True, False
    positions = jnp.arange(150)
    whole, heads = run(model, params, tokens, positions)
    got, fewer = run(model, params, tokens, jnp.where(live, positions, -1), jnp.asarray(read))
    np.testing.assert_array_equal(got[live & read], whole[live & read])
    for layer in range(2):
        for part in range(3):
            wanted = live & read if part == 0 and layer == 1 else live
            np.testing.assert_array_equal(fewer[layer][part][wanted], heads[layer][part][wanted])
    assert np.isfinite(got).all()
    assert not np.asarray(fewer[0][1])[40:64].any()


def test_the_bits_of_a_row_are_its_own(model: Model) -> None:
    params = native_params(model, draw_params(model, "bfloat16"))
    tokens, positions = jnp.arange(70) % 96, jnp.arange(70) * 2
    _, crowd = run(model, params, tokens, positions)
    for first, count in ((0, 1), (3, 2), (9, 13)):
        part = slice(first, first + count)
        _, alone = run(model, params, tokens[part], positions[part])
        jax.tree.map(lambda a, b, part=part: np.testing.assert_array_equal(a, b[part]), alone, crowd)
