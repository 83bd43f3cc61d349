"""The step programs of an 8B Llama in bfloat16, compiled for H200 on a machine without one."""

from __future__ import annotations

import jax
import pytest

from jaxserve.aot import AotUnavailableError, Facts, compile_for, targets
from jaxserve.aot.steps import LLAMA_8B, step_functions
from jaxserve.engine.step import StepFunctions, decode_name, forward_name, head_name
from jaxserve.sampling.head import HeadVariant

ROWS, TILES = 64, 8
WEIGHT_BYTES = 4096 * 4096 * 2
"""Of the smallest large matrix: a copy of this size would be one of a weight or of the pool."""


@pytest.fixture(scope="module")
def functions() -> StepFunctions:
    return step_functions(LLAMA_8B, rows=ROWS, tiles=TILES, pages=1024)


def compiled(functions: StepFunctions, name: str) -> tuple[Facts, int]:
    """What the compiler says of a program, and the bytes of what it writes."""
    program = next(p for p in functions.programs() if p.name == name)
    written = [leaf for position in program.donate for leaf in jax.tree.leaves(program.args[position])]
    try:
        facts = compile_for(targets()["h200"], program.function, program.args, program.donate)
    except AotUnavailableError as error:
        pytest.skip(str(error))
    return facts, sum(leaf.size * leaf.dtype.itemsize for leaf in written)


@pytest.mark.hopper
@pytest.mark.parametrize("name", [decode_name(ROWS, HeadVariant.GREEDY), forward_name(ROWS, TILES)])
def test_forward(functions: StepFunctions, name: str) -> None:
    facts, written = compiled(functions, name)
    assert facts.aliased_bytes >= written
    assert not facts.copies(WEIGHT_BYTES)
    assert facts.temporary_bytes < 200 << 20


@pytest.mark.hopper
@pytest.mark.parametrize("variant", list(HeadVariant))
def test_head(functions: StepFunctions, variant: HeadVariant) -> None:
    facts, written = compiled(functions, head_name(ROWS, variant))
    assert facts.aliased_bytes >= written
    assert not facts.copies(ROWS * LLAMA_8B.vocab_size)
    assert facts.temporary_bytes < 200 << 20
