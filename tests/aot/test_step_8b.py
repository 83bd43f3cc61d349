"""The step programs of an 8B Llama in bfloat16, compiled for H200 on a machine without one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxserve.aot import AotUnavailableError, Facts, compile_for, targets
from jaxserve.engine.shapes import EngineShape
from jaxserve.engine.step import StepFunctions, forward_name, head_name
from jaxserve.kv import formats, kv_shapes
from jaxserve.models.config import DecoderConfig, Llama3Rope
from jaxserve.models.model import Model
from jaxserve.quant.linear import LinearContext
from jaxserve.sampling import state
from jaxserve.sampling.head import HeadVariant
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
PAGES = 1024
ROWS, TILES = 64, 8
LAYER_BYTES = 4096 * 14_336 * 2
"""Of the smallest large matrix: a copy of this size would be a copy of a weight."""


@pytest.fixture(scope="module")
def functions() -> StepFunctions:
    model = Model.from_config(LLAMA_8B, jnp.bfloat16)
    shape = EngineShape(slots=ROWS, max_len=8192, q=1, decode=(ROWS,), tiles=(TILES,))
    layout = SlotLayout(
        slots=ROWS, max_len=8192, vocab=128_256, hidden_rows=shape.hidden_rows, hidden_dim=4096, dtype="bfloat16"
    )
    groups = model.kv_groups()
    kv = kv_shapes(groups, [formats.get("bf16", backend="triton")], [(PAGES,)], ROWS, 8192)
    return StepFunctions(model, shape, layout, LinearContext(), None, model.abstract_params(), kv, state.shapes(layout))


def facts_of(functions: StepFunctions, name: str) -> Facts:
    program = next(p for p in functions.programs() if p.name == name)
    try:
        return compile_for(targets()["h200"], program.function, program.args, program.donate)
    except AotUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.hopper
@pytest.mark.parametrize("name", [forward_name(ROWS, 0), forward_name(ROWS, TILES)])
def test_forward(functions: StepFunctions, name: str) -> None:
    facts = facts_of(functions, name)
    pool = functions.kv.pools[0]
    pool_bytes = pool.size * pool.dtype.itemsize
    assert facts.aliased_bytes >= pool_bytes
    assert not facts.copies(LAYER_BYTES)
    assert facts.temporary_bytes < 200 << 20


@pytest.mark.hopper
@pytest.mark.parametrize("variant", list(HeadVariant))
def test_head(functions: StepFunctions, variant: HeadVariant) -> None:
    facts = facts_of(functions, head_name(ROWS, variant))
    history = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(functions.slots))
    assert facts.aliased_bytes >= history
    assert not facts.copies(64 * 128_256)
    assert facts.temporary_bytes < 200 << 20
