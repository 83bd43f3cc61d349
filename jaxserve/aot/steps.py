"""The step programs of a model without its weights: what an engine would compile, as shapes. Allocates nothing."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxserve.engine.shapes import EngineShape
from jaxserve.engine.step import StepFunctions
from jaxserve.kv import formats, kv_shapes
from jaxserve.models.config import DecoderConfig, Llama3Rope
from jaxserve.models.model import Model
from jaxserve.quant.linear import LinearContext
from jaxserve.sampling import state
from jaxserve.sampling.state import SlotLayout

LLAMA_8B = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14_336,
    max_position=131_072,
    windows=(None,) * 32,
    rope=Llama3Rope(theta=500_000.0),
    rms_eps=1e-5,
    attention_scale=128**-0.5,
    stored_dtype="bfloat16",
)
"""Llama 3.1 8B."""


def step_functions(
    config: DecoderConfig,
    *,
    rows: int,
    tiles: int,
    pages: int,
    max_len: int = 8192,
    kv_format: str = "bf16",
    backend: str = "triton",
    **kv_options: Any,
) -> StepFunctions:
    """The programs of an engine in bfloat16 on one GPU: `rows` decode rows, `tiles` prefill tiles, `pages` KV pages of
    each class of `kv_format`, which gets `kv_options`."""
    model = Model.from_config(config, jnp.bfloat16)
    shape = EngineShape(slots=rows, max_len=max_len, q=1, decode=(rows,), tiles=(tiles,))
    layout = SlotLayout(
        slots=rows,
        max_len=max_len,
        vocab=config.vocab_size,
        hidden_rows=shape.hidden_rows,
        hidden_dim=config.hidden,
        dtype="bfloat16",
    )
    groups = model.kv_groups()
    # Named, because the platform that compiles is not the one that will run.
    format = formats.get(kv_format, backend=backend, **kv_options)
    kv = kv_shapes(groups, [format] * len(groups), [(pages,) * len(format.kinds(g)) for g in groups], rows, max_len)
    params = model.abstract_params()
    return StepFunctions(model, shape, layout, LinearContext(), None, params, groups, kv, state.shapes(layout))
