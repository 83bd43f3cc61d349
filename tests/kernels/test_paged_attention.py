"""Both paged attention ops, all their backends, one body: close to float64, and what must hold bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.layouts import Columns
from pallas_kernels.merge import Attended, merge, normalize
from pallas_kernels.native.attention import native_or, tiles_target
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_decode import reference as decode_reference
from pallas_kernels.paged_prefill import paged_prefill
from pallas_kernels.paged_prefill import reference as prefill_reference
from tests.kernels.cases import LAYOUTS, PAGE, TRITON, Case, Inputs, attend, expected, inputs

DECODE = {
    "lengths": Case(positions=(0, 1, 62, 63, 64, 200, -1), counts=(1, 1, 1, 1, 1, 1, 0)),
    "drafts, group of 3": Case(positions=(60, 64, 188, -1), counts=(4, 2, 1, 0), q_tokens=4, heads=9, kv_heads=3),
    "window, group of 8, head_dim 128": Case(
        positions=(0, 63, 64, 300), counts=(1, 1, 1, 1), window=65, heads=8, kv_heads=1, head_dim=128
    ),
    "window within a page, softcap, no group": Case(
        positions=(10, 190), counts=(2, 2), q_tokens=2, window=5, softcap=5.0, heads=2, kv_heads=2
    ),
    "bfloat16": Case(positions=(100, 3), counts=(1, 1), dtype="bfloat16", head_dim=128),
    "int8": Case(positions=(0, 1, 63, 64, 200, -1), counts=(1, 1, 1, 1, 1, 0), layout="int8"),
    "int8, outliers": Case(positions=(190,), counts=(1,), heads=8, head_dim=128, layout="int8", outliers=8.0),
    "int8, drafts, window, softcap": Case(
        positions=(60, 188), counts=(4, 2), q_tokens=4, heads=6, window=65, softcap=5.0, layout="int8"
    ),
    "fp8": Case(positions=(0, 1, 63, 64, 200, -1), counts=(1, 1, 1, 1, 1, 0), layout="fp8"),
    "fp8, outliers, bfloat16": Case(
        positions=(190,), counts=(1,), heads=8, head_dim=128, layout="fp8", outliers=8.0, dtype="bfloat16"
    ),
}
PREFILL = {
    "chunk, group of 3": Case(positions=(0, 64, 128), counts=(64, 64, 40), q_tokens=PAGE, heads=3, kv_heads=1),
    "starts inside a page": Case(positions=(70, -1, 191), counts=(58, 0, 1), q_tokens=PAGE),
    "window": Case(positions=(192,), counts=(64,), q_tokens=PAGE, window=70, head_dim=128),
    "bfloat16, softcap": Case(positions=(64,), counts=(33,), q_tokens=PAGE, dtype="bfloat16", softcap=20.0),
    "int8": Case(positions=(70, -1, 191), counts=(58, 0, 1), q_tokens=PAGE, layout="int8"),
    "int8, window, outliers": Case(
        positions=(192,), counts=(64,), q_tokens=PAGE, window=70, head_dim=128, layout="int8", outliers=8.0
    ),
    "fp8": Case(positions=(0, 64, 128), counts=(64, 64, 40), q_tokens=PAGE, heads=3, kv_heads=1, layout="fp8"),
}
BACKENDS: dict[str, dict[str, Callable[..., Attended]]] = {
    "decode": {
        "reference": decode_reference.paged_decode,
        "tiled": decode_reference.tiled,  # a prefill of padded rows: what they see is tested there
        "native": native_or(decode_reference.paged_decode),
        "triton": TRITON["decode"],
    },
    "prefill": {
        "reference": prefill_reference.paged_prefill,
        "native": native_or(prefill_reference.paged_prefill),
        "native tiles": native_or(prefill_reference.paged_prefill, tiles_target),
        "triton": TRITON["prefill"],
    },
}
ALL = (
    [
        pytest.param(backend, case, id=f"{op}-{name}-{label}")
        for op, cases in (("decode", DECODE), ("prefill", PREFILL))
        for name, backend in BACKENDS[op].items()
        for label, case in cases.items()
        if (name != "native tiles" or case.layout == "dense")
        and (name != "tiled" or label in ("lengths", "drafts, group of 3"))
    ]
    + [
        pytest.param(
            BACKENDS[op]["reference"],
            replace(case, layout=f"{case.layout} columns"),
            id=f"{op}-reference-{label}, columns",
        )
        for op, cases in (("decode", DECODE), ("prefill", PREFILL))
        for label, case in cases.items()
        if case.layout != "dense" or label in ("lengths", "chunk, group of 3")
    ]
    + [
        pytest.param(
            BACKENDS[op]["native"],
            replace(case, layout=f"{case.layout} host"),
            id=f"{op}-native-{label}, as CPUs hold it",
        )
        for op, cases in (("decode", DECODE), ("prefill", PREFILL))
        for label, case in cases.items()
        if case.layout != "dense"
    ]
)


def run(
    op: Callable[..., Attended], case: Case, x: Inputs, places: jax.Array | None = None, quickly: bool = False
) -> Attended:
    return attend(op, LAYOUTS[case.layout], case, x, places=places, quickly=quickly)


def same_bits(a: Attended, b: Attended) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("op", "case"), ALL)
def test_close_to_float64(op: Callable[..., Attended], case: Case) -> None:
    x = inputs(case)
    got = normalize(run(op, case, x, quickly=True))
    # Products in bfloat16 round the softmax weights to it before P V, and kernels over 8-bit pages round q, too.
    rounds = case.dtype == "bfloat16" or (case.layout != "dense" and op in TRITON.values())
    tolerance = 1e-2 * case.outliers if rounds else 2e-6 * case.outliers**2
    np.testing.assert_allclose(got, expected(case, x, 1), atol=tolerance)


@pytest.mark.parametrize("label", ["lengths", "int8"])
@pytest.mark.parametrize("name", ["reference", "native", "triton"])
def test_page_ids_do_not_matter(name: str, label: str) -> None:
    op = BACKENDS["decode"][name]
    case = DECODE[label]
    x = inputs(case)
    order = np.random.default_rng(1).permutation(jax.tree.leaves(x.pool)[0].shape[0]).astype(np.int32)
    moved = jax.tree.map(lambda pool: jnp.asarray(np.asarray(pool)[np.argsort(order)]), x.pool)
    tables = np.asarray(x.tables)
    tables = jnp.asarray(np.where(tables < len(order), order[np.minimum(tables, len(order) - 1)], tables))
    other = Inputs(x.q, x.positions, x.counts, moved, tables)
    assert same_bits(run(op, case, x), run(op, case, other))


CROWD = Case(positions=(383,) * 6, counts=(1,) * 6)


@functools.cache
def crowd() -> Callable[[Sequence[int]], Attended]:
    x = inputs(CROWD)
    op = functools.partial(
        decode_reference.paged_decode,
        counts=x.counts,
        scale=CROWD.scale,
        window=None,
        softcap=None,
        layout=LAYOUTS[CROWD.layout],
    )
    call = jax.jit(lambda positions: op(x.q, positions, x.pool, 1, x.tables))
    return lambda positions: call(jnp.asarray(positions, jnp.int32))


@given(lengths=st.lists(st.integers(-1, 383), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_rows_do_not_see_each_other(lengths: list[int]) -> None:
    """The bits of the first rows are the same whatever the lengths of the others."""
    run_crowd = crowd()
    alone, together = run_crowd([100, 63, -1, -1, -1, -1]), run_crowd([100, 63, *lengths])
    assert same_bits(Attended(*(z[:2] for z in alone)), Attended(*(z[:2] for z in together)))


@pytest.mark.parametrize("heads", [(9, 3, 64, "dense"), (4, 2, 64, "int8 columns"), (4, 1, 128, "fp8 columns")])
def test_tiled_decode_has_the_bits_of_a_prefill(heads: tuple[int, int, int, str]) -> None:
    """Token by token, in crowds of any size, from any start: the same bits as the whole tile."""
    h, kv_heads, head_dim, layout = heads
    shape = {"heads": h, "kv_heads": kv_heads, "head_dim": head_dim, "layout": layout}
    case = Case(positions=(192,), counts=(64,), q_tokens=PAGE, **shape)
    x = inputs(case)
    whole = run(prefill_reference.paged_prefill, case, x)
    for first, rows in ((0, 1), (48, 16)):
        single = Inputs(
            jnp.asarray(np.asarray(x.q)[0, first : first + rows, None]),
            jnp.asarray(192 + first + np.arange(rows, dtype=np.int32)),
            jnp.asarray(np.ones(rows, np.int32)),
            x.pool,
            jnp.asarray(np.tile(x.tables, (rows, 1))),
        )
        got = run(decode_reference.tiled, Case(positions=(), counts=(), **shape), single)
        assert same_bits(got, Attended(*(np.asarray(z)[0, first : first + rows, None] for z in whole)))
    late = Inputs(jnp.asarray(np.roll(x.q, -20, axis=1)), x.positions + 20, x.counts - 20, x.pool, x.tables)
    got = run(prefill_reference.paged_prefill, case, late)
    assert same_bits(Attended(*(np.asarray(z)[:, :44] for z in got)), Attended(*(np.asarray(z)[:, 20:] for z in whole)))


def test_absent_pages_are_not_seen() -> None:
    case = Case(positions=(200,), counts=(1,))
    x = inputs(case)
    holes = x.tables.at[0, 1].set(1 << 30)
    part = run(decode_reference.paged_decode, case, Inputs(x.q, x.positions, x.counts, x.pool, holes))
    only = x.tables.at[0, jnp.array([0, 2, 3])].set(1 << 30)
    other = run(decode_reference.paged_decode, case, Inputs(x.q, x.positions, x.counts, x.pool, only))
    np.testing.assert_allclose(normalize(merge([part, other])), expected(case, x, 1), atol=2e-6)


@pytest.mark.parametrize(
    ("op", "window"),
    [
        pytest.param(BACKENDS[kind][name], window, id=f"{kind}-{name}-{window}")
        for kind, name, window in [
            ("decode", "reference", None),
            ("decode", "tiled", 70),
            ("decode", "native", 70),
            ("decode", "triton", 70),
            ("prefill", "reference", 70),
            ("prefill", "native", None),
            ("prefill", "native tiles", 70),
            ("prefill", "triton", None),
        ]
    ],
)
def test_a_table_may_be_a_short_list_of_pages(op: Callable[..., Attended], window: int | None) -> None:
    """Two lists that share the pages of a sequence between them, each in an order of its own."""
    case = Case(positions=(320, 130, -1), counts=(64, 60, 0), q_tokens=PAGE, window=window)
    x = inputs(case)
    parts = []
    for chosen in ([5, 0, 3], [1, 4, 2]):
        short = Inputs(x.q, x.positions, x.counts, x.pool, jnp.asarray(np.asarray(x.tables)[:, chosen]))
        parts.append(run(op, case, short, places=jnp.asarray(np.tile(np.int32(chosen), (3, 1))), quickly=True))
    np.testing.assert_allclose(normalize(merge(parts)), expected(case, x, 1), atol=2e-6)


def test_merge_of_nothing_changes_no_bit() -> None:
    x = inputs(DECODE["lengths"])
    part = run(decode_reference.paged_decode, DECODE["lengths"], x)
    nothing = Attended(jnp.zeros_like(part.o), jnp.full_like(part.m, -1e30), jnp.zeros_like(part.l))
    assert same_bits(merge([part, nothing]), part)
    assert not np.any(normalize(nothing))


def test_wrong_shapes_are_named() -> None:
    x = inputs(DECODE["lengths"])
    with pytest.raises(ValueError, match=r"paged_decode: positions must be \[7\]"):
        paged_decode(x.q, x.positions[:3], x.pool, 0, x.tables, scale=1.0)
    with pytest.raises(ValueError, match="head_dim 32, the pool 64"):
        paged_prefill(x.q[..., :32], x.positions, x.pool, 0, x.tables, scale=1.0)
    with pytest.raises(ValueError, match="backend 'cuda' is not one of"):
        paged_decode(x.q, x.positions, x.pool, 0, x.tables, scale=1.0, backend="cuda")
    columns = Columns(jnp.float32)
    with pytest.raises(ValueError, match=r"paged_decode: backend triton cannot read pages laid out as Columns"):
        pool = tuple(jnp.zeros(array.shape, array.dtype) for array in columns.pool(4, 1, 2, 64, 64))
        paged_decode(x.q, x.positions, pool, 0, x.tables, scale=1.0, layout=columns, backend="triton")
