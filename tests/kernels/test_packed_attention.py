"""Paged attention over packed pages, all layouts and backends: close to float64 on what the codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.merge import Attended, merge, normalize
from pallas_kernels.native.attention import native_or
from pallas_kernels.paged_decode import reference as decode_reference
from pallas_kernels.paged_prefill import reference as prefill_reference
from tests.kernels.cases import PAGE, TRITON, Case, Inputs, attend, expected
from tests.kernels.packed_cases import LAYOUTS, packed_inputs

CASES = {
    "decode": Case(positions=(0, 1, 63, 64, 200, -1), counts=(1, 1, 1, 1, 1, 0)),
    "decode, head_dim 128, group of 3": Case(positions=(190, 77), counts=(1, 1), heads=6, kv_heads=2, head_dim=128),
    "decode, drafts, window, softcap": Case(
        positions=(60, 188, -1), counts=(4, 2, 0), q_tokens=4, window=65, softcap=5.0
    ),
    "prefill": Case(positions=(0, 70, -1, 128), counts=(64, 58, 0, 64), q_tokens=PAGE),
    "prefill, head_dim 128, window": Case(
        positions=(128,), counts=(33,), q_tokens=PAGE, window=70, head_dim=128, heads=2, kv_heads=1
    ),
}
REFERENCE: dict[str, Callable[..., Attended]] = {
    "decode": decode_reference.paged_decode,
    "prefill": prefill_reference.paged_prefill,
}
NATIVE = {op: native_or(reference) for op, reference in REFERENCE.items()}
BACKENDS = {"reference": REFERENCE, "native": NATIVE, "triton": TRITON}
FEW_NAMES = ["kivi4", "hack2", "hack8, form P"]
FEW = pytest.mark.parametrize("name", FEW_NAMES)
PAIRS = [
    *((name, "decode") for name in LAYOUTS),
    *((name, label) for name in FEW_NAMES for label in ("decode, head_dim 128, group of 3", "prefill")),
    *((name, "decode, drafts, window, softcap") for name in ("kivi4", "hack2")),
    ("hack8, form P", "prefill, head_dim 128, window"),
]
"""Codes and sizes decide how a page is read; which of its tokens count is decided without a look at its layout."""


def error(got: jax.Array, exact: np.ndarray) -> float:
    """Relative, over everything."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(("name", "label"), PAIRS)
def test_close_to_float64_and_kernels_to_reference(name: str, label: str) -> None:
    layout, case = LAYOUTS[name], CASES[label]
    sealed, plain = packed_inputs(case, layout)
    op = label.split(",")[0]
    exact = expected(case, plain, 1)
    reference = normalize(attend(REFERENCE[op], layout, case, sealed, quickly=True))
    kernel = normalize(attend(TRITON[op], layout, case, sealed))
    homomorphic = "Hack" in type(layout).__name__
    # Dequantized: float32. Homomorphic: q and p in 8 bits.
    assert error(reference, exact) < (0.05 if homomorphic else 2e-6)
    native = normalize(attend(NATIVE[op], layout, case, sealed))
    assert error(native, exact) < (0.05 if homomorphic else 2e-6)
    assert error(native, np.asarray(reference, np.float64)) < (2e-3 if homomorphic else 2e-6)
    # The kernel of KIVI rounds its operands to bfloat16. That of HACK computes what the reference does, unless a p lies
    # on the border between two 8-bit codes.
    assert error(kernel, np.asarray(reference, np.float64)) < (2e-3 if homomorphic else 1.5e-2)


@FEW
@pytest.mark.parametrize("backend", BACKENDS)
def test_page_ids_do_not_matter(name: str, backend: str) -> None:
    layout, case = LAYOUTS[name], CASES["decode"]
    op = BACKENDS[backend]["decode"]
    x, _ = packed_inputs(case, layout)
    pages = layout.page_shape(x.pool)[0]
    order = np.random.default_rng(1).permutation(pages).astype(np.int32)
    moved = {n: jnp.asarray(np.asarray(a)[np.argsort(order)]) for n, a in x.pool.items()}
    tables = np.asarray(x.tables)
    tables = jnp.asarray(np.where(tables < pages, order[np.minimum(tables, pages - 1)], tables))
    other = Inputs(x.q, x.positions, x.counts, moved, tables)
    for a, b in zip(attend(op, layout, case, x), attend(op, layout, case, other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("hack2", "reference"), ("kivi4", "triton"), ("hack8, form P", "triton"), ("hack2", "native")],
)
def test_lists_of_pages_merge(name: str, backend: str) -> None:
    """Two lists that share the pages of a sequence between them, each in an order of its own."""
    layout = LAYOUTS[name]
    case = Case(positions=(320, 130, -1), counts=(64, 60, 0), q_tokens=PAGE, window=170)
    op = BACKENDS[backend]["prefill"]
    x, plain = packed_inputs(case, layout)
    parts = []
    for chosen in ([5, 0, 3], [1, 4, 2]):
        short = replace(x, tables=jnp.asarray(np.asarray(x.tables)[:, chosen]))
        parts.append(
            attend(op, layout, case, short, places=jnp.asarray(np.tile(np.int32(chosen), (3, 1))), quickly=True)
        )
    assert error(normalize(merge(parts)), expected(case, plain, 1)) < 0.05


@pytest.mark.parametrize("name", ["kivi2", "hack4, form P", "hack2, groups of 32"])
def test_tiled_decode_has_the_bits_of_a_prefill(name: str) -> None:
    """Token by token, in crowds of any size, from any start: the same bits as the whole tile."""
    layout = LAYOUTS[name]
    heads, kv_heads, head_dim = (3, 1, 128) if "32" in name else (4, 2, 64)
    case = Case(positions=(192,), counts=(64,), q_tokens=PAGE, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    x, _ = packed_inputs(case, layout)
    whole = attend(prefill_reference.paged_prefill, layout, case, x)
    for first, rows in ((0, 1), (5, 3)):
        single = Inputs(
            jnp.asarray(np.asarray(x.q)[0, first : first + rows, None]),
            jnp.asarray(192 + first + np.arange(rows, dtype=np.int32)),
            jnp.asarray(np.ones(rows, np.int32)),
            x.pool,
            jnp.asarray(np.tile(x.tables, (rows, 1))),
        )
        got = attend(decode_reference.tiled, layout, case, single)
        for a, b in zip(got, whole, strict=True):
            np.testing.assert_array_equal(a, np.asarray(b)[0, first : first + rows, None])
    late = Inputs(jnp.asarray(np.roll(x.q, -20, axis=1)), x.positions + 20, x.counts - 20, x.pool, x.tables)
    for a, b in zip(attend(prefill_reference.paged_prefill, layout, case, late), whole, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:, :44], np.asarray(b)[:, 20:])


@FEW
def test_rows_do_not_see_each_other(name: str) -> None:
    """The bits of a row are the same whatever the lengths of the others."""
    layout, case = LAYOUTS[name], CASES["decode"]
    x, _ = packed_inputs(case, layout)
    whole = attend(decode_reference.paged_decode, layout, case, x)
    for others in ([-1, -1, -1, -1], [0, 0, 50, 0]):
        crowd = replace(x, positions=jnp.asarray([*others[:3], 64, 200, others[3]], jnp.int32))
        for a, b in zip(attend(decode_reference.paged_decode, layout, case, crowd), whole, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[3:5], np.asarray(b)[3:5])
