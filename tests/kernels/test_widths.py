"""Sealed pages whose keys and values differ in channels: attention is that over the channels they hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layouts import FloatColumns, FloatRows, HostFloatRows, Kivi, hack
from pallas_kernels.layouts.packed import page_bytes
from pallas_kernels.merge import normalize
from tests.kernels.cases import PAGE, TRITON, Case, Inputs, attend, expected, inputs
from tests.kernels.packed_cases import halves, seal, unsealed
from tests.kernels.test_packed_attention import NATIVE, REFERENCE, error

CASES = {
    "decode": Case(positions=(0, 63, 64, 200, -1), counts=(1, 1, 1, 1, 0), head_dim=128),
    "prefill": Case(positions=(70, -1, 128), counts=(58, 0, 64), q_tokens=PAGE, head_dim=128, window=100),
}


def narrow(case: Case, layout: Any, keys: int, values: int) -> tuple[Inputs, np.ndarray]:
    """The inputs of `case` with a pool of `layout` that holds the first channels, and float64 attention over what the
    pool stands for."""
    x = inputs(case)
    k, v = halves(x)
    k, v = k[..., :keys], v[..., :values]
    sealed = seal(layout, k, v)
    held = [np.asarray(a, np.float32) for a in (unsealed(layout, sealed) if hasattr(layout, "decode") else (k, v))]
    plain = np.stack([np.pad(a, [(0, 0)] * 4 + [(0, case.head_dim - a.shape[-1])]) for a in held], axis=2)
    exact = expected(case, dataclasses.replace(x, pool=jnp.asarray(plain)), 1)[..., :values]
    q = jnp.asarray(np.asarray(x.q)[..., :keys])
    return dataclasses.replace(x, q=q, pool=sealed), exact  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("label", "keys", "values"), [("decode", 48, 32), ("decode", 16, 128), ("prefill", 96, 80), ("prefill", 128, 64)]
)
def test_floats(label: str, keys: int, values: int) -> None:
    for layout, ops, bound in (
        (FloatColumns(), REFERENCE, 2e-6),
        (FloatRows(), REFERENCE, 2e-6),
        (FloatRows(jnp.float16), NATIVE, 2e-6),
        (HostFloatRows(), NATIVE, 2e-6),
        (HostFloatRows(), REFERENCE, 2e-6),
        (FloatRows(), TRITON, 1e-2),  # p is rounded to the type of the pages, as in every 16-bit kernel
        (FloatRows(jnp.float32), TRITON, 2e-6),
    ):
        x, exact = narrow(CASES[label], layout, keys, values)
        assert layout.page_shape(x.pool)[3:] == (keys, values)
        assert error(normalize(attend(ops[label], layout, CASES[label], x, quickly=True)), exact) < bound


@pytest.mark.parametrize(
    ("layout", "keys", "values"),
    [
        (Kivi(4, group=32), 64, 32),
        (Kivi(2), 128, 64),
        (hack(4, group=32), 32, 64),
        (hack(8, group=32), 32, 32),
        (hack(2), 64, 128),
        (hack(4, "P", group=32), 64, 32),
        (hack(8), 128, 64),
    ],
)
def test_codes(layout: Any, keys: int, values: int) -> None:
    case = CASES["decode"]
    x, exact = narrow(case, layout, keys, values)
    reference = normalize(attend(REFERENCE["decode"], layout, case, x, quickly=True))
    kernel = normalize(attend(TRITON["decode"], layout, case, x))
    native = normalize(attend(NATIVE["decode"], layout, case, x))
    homomorphic = not isinstance(layout, Kivi)
    assert error(reference, exact) < (0.05 if homomorphic else 2e-6)
    assert error(native, exact) < (0.05 if homomorphic else 2e-6)
    assert error(native, np.asarray(reference, np.float64)) < (2e-3 if homomorphic else 2e-6)
    assert error(kernel, np.asarray(reference, np.float64)) < (2e-3 if homomorphic else 1.5e-2)


def test_bytes_are_those_of_the_channels_held() -> None:
    assert page_bytes(FloatRows().shapes(2, 64, 96, 64)) == page_bytes(FloatColumns().shapes(2, 64, 96, 64))
    assert page_bytes(FloatRows().shapes(2, 64, 96, 64)) == 2 * 64 * (96 + 64) * 2
    half, whole = (page_bytes(hack(4).shapes(1, 64, dim, dim)) for dim in (64, 128))
    assert half == whole / 2


@pytest.mark.parametrize(
    ("layout", "dims", "words"),
    [
        (FloatRows(), (40, 32), "multiple of 16, not 40"),
        (FloatColumns(), (48, 0), "multiple of 16, not 0"),
        (hack(2), (64, 32), "2 bits need a head_dim of 64 or 128, not 32"),
        (hack(4), (96, 64), "32, 64 or 128, not 96"),
        (hack(4), (64, 32), "groups of 64"),
    ],
)
def test_widths_that_do_not_exist_are_refused(layout: Any, dims: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layout.shapes(1, 64, *dims)
