"""The Mosaic GPU kernels under jax's interpreter, which simulates warpgroups, barriers and copies and looks for races.

What it does not show: the transposed operand of Q K^T and register layouts, which it does not know, and what ptxas
makes of the kernel. `tests/aot` compiles it; `scripts/gpu_day.py` runs it on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.merge import normalize
from pallas_kernels.paged_decode import mosaic as decode
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import mosaic as prefill
from tests.kernels.cases import LAYOUTS, PAGE, QUICKLY, Case, Inputs, expected, inputs

CASES = {
    "decode, four steps": (decode.paged_decode, Case(positions=(250,), counts=(1,), heads=4, kv_heads=1), 1),
    "decode, splits, drafts, window": (
        decode.paged_decode,
        Case(positions=(188, -1), counts=(2, 0), q_tokens=3, heads=2, kv_heads=1, window=70, head_dim=128),
        2,
    ),
    "prefill, two heads share pages": (
        prefill.paged_prefill,
        Case(positions=(70, -1), counts=(58, 0), q_tokens=PAGE, heads=2, kv_heads=1),
        None,
    ),
    "prefill, odd group, softcap": (
        prefill.paged_prefill,
        Case(positions=(64,), counts=(64,), q_tokens=PAGE, heads=3, kv_heads=3, softcap=20.0),
        None,
    ),
}


@pytest.mark.parametrize("label", CASES)
def test_close_to_float64_without_races(label: str) -> None:
    op, case, splits = CASES[label]
    case = Case(**{**vars(case), "dtype": "bfloat16"})
    x = inputs(case)
    options = {} if splits is None else {"splits": splits}
    try:
        call = functools.partial(
            op,
            scale=case.scale,
            window=case.window,
            softcap=case.softcap,
            layout=LAYOUTS["dense"],
            interpret=InterpretGPUParams(detect_races=True),
            **options,
        )
        quickly = jax.jit(call, compiler_options=QUICKLY)
        got = quickly(x.q, x.positions, x.pool, 1, x.tables, counts=x.counts)
        jax.block_until_ready(got)
        races = interpret_pallas_call.get_races().races_found
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
    assert not races
    np.testing.assert_allclose(normalize(got), expected(case, x, 1), atol=1e-2)


def test_what_it_cannot_do_runs_on_the_triton_kernel() -> None:
    """Formats, dtypes and head sizes: no choice of backend makes a request fail."""
    for case in (
        Case(positions=(5,), counts=(1,), dtype="float32"),
        Case(positions=(5,), counts=(1,), dtype="bfloat16", head_dim=32),
        Case(positions=(5,), counts=(1,), dtype="bfloat16", layout="int8"),
        Case(positions=(5,), counts=(1,), dtype="bfloat16", heads=72, kv_heads=1),
    ):
        x, layout = inputs(case), LAYOUTS[case.layout]

        def call(q: jax.Array, pool: Any, layout: Any = layout, x: Inputs = x) -> Any:
            return paged_decode(q, x.positions, pool, 0, x.tables, scale=1.0, layout=layout, backend="mosaic")

        calls = [e for e in jax.make_jaxpr(call)(x.q, x.pool).eqns if e.primitive.name == "pallas_call"]
        assert [e.params["name"] for e in calls] == ["paged_decode"]
