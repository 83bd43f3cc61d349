"""Every family agrees with transformers on random checkpoints, however the prompt is cut."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoint import load_model
from jaxserve.models.dense_attention import causal_attention, dense_attend
from jaxserve.models.native import native_params
from jaxserve.quant import QTensor
from pallas_kernels.native.build import compiler
from tests.models.conftest import CASES

TOLERANCE = 1e-4  # of the largest |logit|


def assert_agrees(ours, theirs):
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_whole_prompt(case, reference):
    made = reference(case)
    model, params = load_model(made.folder, "float32")

    @jax.jit
    def logits(params, tokens):
        hidden, _ = model.forward(params, tokens, jnp.arange(len(tokens)), None, dense_attend(model, chunk=64))
        return model.logits(params, hidden)

    assert_agrees(logits(params, made.tokens), made.logits)


@pytest.mark.parametrize(("dtype", "quantization", "error"), [("bfloat16", None, 0.05), ("float32", "int8", 0.05)])
def test_shorter_formats_stay_close(dtype, quantization, error, reference):
    made = reference("qwen3")
    model, params = load_model(made.folder, dtype, quantization)

    @jax.jit
    def logits(params, tokens):
        hidden, _ = model.forward(params, tokens, jnp.arange(len(tokens)), None, dense_attend(model))
        return model.logits(params, hidden)

    ours = logits(params, made.tokens)
    assert ours.dtype == jnp.float32
    assert np.sqrt(np.mean((ours - made.logits) ** 2)) <= error * made.logits.std()


@pytest.mark.parametrize("case", ["llama_multi_head", "llama_tied"])
def test_weights_as_the_kernels_of_cpus_read_them(case, reference):
    """An untied head in panels, a tied embedding as a table."""
    made = reference(case)
    model, params = load_model(made.folder, "float32")
    params = native_params(model, params)
    held = {leaf.format for leaf in jax.tree.leaves(params, is_leaf=is_qtensor) if is_qtensor(leaf)}
    assert held == (set() if compiler() is None else {"panels", "table"} if model.config.tie_embeddings else {"panels"})

    @jax.jit
    def logits(params, tokens):
        hidden, _ = model.forward(params, tokens, jnp.arange(len(tokens)), None, dense_attend(model))
        return model.logits(params, hidden)

    assert_agrees(logits(params, made.tokens), made.logits)


def is_qtensor(leaf):
    return isinstance(leaf, QTensor)


def growing_cache(model):
    """An attend whose kv maps a layer to all keys and values so far."""

    def attend(layer, kv, q, k, v):
        past_k, past_v = kv.get(layer, (k[:0], v[:0]))
        k, v = jnp.concatenate([past_k, k]), jnp.concatenate([past_v, v])
        # Queries are the last rows: earlier ones are computed and dropped, which is slow and plainly right.
        rows = jnp.concatenate([jnp.zeros((len(past_k), *q.shape[1:]), q.dtype), q])
        o = causal_attention(rows, k, v, model.attention_spec(layer))
        return kv | {layer: (k, v)}, o[len(past_k) :]

    return attend


@pytest.mark.parametrize("case", ["llama_llama3_rope", "mistral_window", "gemma3"])
@pytest.mark.parametrize("cuts", [(0, 17, 40), (0, 1, 2, 3)], ids=["chunks", "tokens"])
def test_prompt_in_parts(case, cuts, reference):
    made = reference(case)
    model, params = load_model(made.folder, "float32")

    @jax.jit
    def step(params, tokens, positions, kv):
        hidden, kv = model.forward(params, tokens, positions, kv, growing_cache(model))
        return model.logits(params, hidden), kv

    kv, parts = {}, []
    for start, end in zip(cuts, cuts[1:], strict=False):
        logits, kv = step(params, made.tokens[start:end], jnp.arange(start, end), kv)
        parts.append(logits)
    assert_agrees(np.concatenate(parts), made.logits[: cuts[-1]])


def test_batched_attention_equals_single_sequences(reference):
    made = reference("qwen3")
    model, params = load_model(made.folder, "float32")
    rows = made.tokens.reshape(4, 25)
    positions = jnp.tile(jnp.arange(25), 4)

    @partial(jax.jit, static_argnames="batch")
    def hidden(params, tokens, positions, batch):
        return model.forward(params, tokens, positions, None, dense_attend(model, batch, chunk=10))[0]

    together = hidden(params, rows.reshape(-1), positions, batch=4)
    alone = [hidden(params, row, jnp.arange(25), batch=1) for row in rows]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-5)
