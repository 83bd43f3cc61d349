"""The C kernel of CPUs: it runs where it claims to, its bits belong to the query, and without it the ops still work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import resolve
from pallas_kernels.layouts import Columns, Dense, HostDense, HostFloatRows, Kivi, float_layout
from pallas_kernels.merge import Attended, normalize
from pallas_kernels.native import build
from pallas_kernels.native.attention import attention_target, native_or
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_decode import reference as decode_reference
from pallas_kernels.paged_prefill import paged_prefill
from tests.kernels.cases import LAYOUTS, PAGE, Case, Inputs, attend, expected, inputs
from tests.kernels.packed_cases import LAYOUTS as PACKED
from tests.kernels.packed_cases import halves, packed_inputs, seal

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")


TOKENS = ["dense", "dense host", "int8", "int8 host", "fp8", "fp8 host"]
"""Layouts of `cases` that the kernel reads."""
BOTH = native_or(decode_reference.paged_decode), decode_reference.paged_decode
"""Decode by the kernel and by its definition."""


DECODE, PREFILL = (partial(op, backend="invariant") for op in (paged_decode, paged_prefill))


def run(case: Case, x: Inputs, layout: Any = None) -> Attended:
    return attend(DECODE if case.q_tokens == 1 else PREFILL, layout or LAYOUTS[case.layout], case, x)


@needs_compiler
def test_it_is_what_cpus_run() -> None:
    assert resolve(None) == "native"
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        layout = float_layout(dtype, None)
        assert isinstance(layout, HostDense)
        assert attention_target(layout.pool(4, 1, 2, 64, 64), layout)
    for name in TOKENS:
        assert attention_target(LAYOUTS[name].pool(4, 1, 2, 64, 64), LAYOUTS[name])
    assert attention_target(Dense().pool(4, 1, 2, 64, 24), Dense()) is None
    assert attention_target(Columns().pool(4, 1, 2, 64, 64), Columns()) is None


def same_alone(case: Case, x: Inputs, layout: Any = None) -> None:
    """Fails unless queries of the tile that `case` is have the same bits by decode, in crowds of any size, with threads
    taking rows as they come."""
    whole = run(case, x, layout)
    start = case.positions[0]
    for first, rows in ((0, 1), (5, 3), (0, 64)):
        single = Inputs(
            jnp.asarray(np.asarray(x.q)[0, first : first + rows, None]),
            jnp.asarray(start + first + np.arange(rows, dtype=np.int32)),
            jnp.asarray(np.ones(rows, np.int32)),
            x.pool,
            jnp.asarray(np.tile(x.tables, (rows, 1))),
        )
        for _ in range(3):
            got = run(replace(case, q_tokens=1, positions=(), counts=()), single, layout)
            for a, b in zip(got, whole, strict=True):
                np.testing.assert_array_equal(a, np.asarray(b)[0, first : first + rows, None])


@needs_compiler
@pytest.mark.parametrize(
    ("layout", "dtype", "heads", "kv_heads", "head_dim"),
    [
        ("dense", "float32", 4, 2, 64),
        ("dense", "float16", 8, 1, 128),
        ("dense host", "float32", 9, 3, 32),
        ("int8", "float32", 4, 2, 64),
        ("int8 host", "float32", 8, 1, 128),
        ("fp8", "float32", 9, 3, 32),
        ("fp8 host", "float32", 4, 2, 64),
    ],
)
def test_the_bits_of_a_query_are_its_own(layout: str, dtype: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """Each header of pages with each size, each kind of code with two: every pair is compiled by itself."""
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "layout": layout, "dtype": dtype}
    case = Case(positions=(192,), counts=(64,), q_tokens=PAGE, window=150, **shape)
    same_alone(case, inputs(case))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "head_dim"),
    [
        *(
            (name, 4, 2, 64)
            for name in ("kivi2", "kivi2, groups of 32", "hack8", "hack2, groups of 32", "hack4, form P")
        ),
        ("kivi4", 8, 1, 128),
        ("hack2", 9, 3, 128),
        ("hack8, form P", 6, 2, 128),
    ],
)
def test_the_bits_of_a_query_are_its_own_on_packed_pages(name: str, heads: int, kv_heads: int, head_dim: int) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    case = Case(positions=(192,), counts=(64,), q_tokens=PAGE, window=150, **shape)
    x, _ = packed_inputs(case, PACKED[name])
    assert attention_target(x.pool, PACKED[name])
    same_alone(case, x, PACKED[name])


@needs_compiler
def test_the_bits_of_a_query_are_its_own_on_sealed_floats() -> None:
    case = Case(positions=(192,), counts=(64,), q_tokens=PAGE, window=150)
    x = inputs(case)
    k, v = halves(x)
    narrow = replace(x, q=x.q[..., :48], pool=seal(HostFloatRows(), k[..., :48], v[..., :32]))
    assert attention_target(narrow.pool, HostFloatRows())
    same_alone(case, narrow, HostFloatRows())


@needs_compiler
@pytest.mark.parametrize("name", ["dense host", "int8", "fp8 host", "kivi4", "hack2", "hack8, form P"])
def test_lists_with_absent_pages(name: str) -> None:
    """A table in an order of its own, with holes and a window: as the reference reads it."""
    case = Case(positions=(320, 130, -1), counts=(1, 1, 0), window=200, layout=name if name in LAYOUTS else "dense")
    layout = LAYOUTS.get(name) or PACKED[name]
    x = inputs(case) if name in LAYOUTS else packed_inputs(case, PACKED[name])[0]
    chosen = np.array([5, 0, 3, 2, 1], np.int32)
    tables = np.asarray(x.tables)[:, chosen]
    tables[0, 2] = 1 << 30
    short, places = replace(x, tables=jnp.asarray(tables)), jnp.asarray(np.tile(chosen, (3, 1)))
    got, reference = (normalize(attend(op, layout, case, short, places=places, quickly=True)) for op in BOTH)
    np.testing.assert_allclose(got, reference, atol=2e-3 if "hack" in name else 4e-6)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "page_tokens"), [("kivi4", 32), ("kivi4", 128), ("hack8", 32), ("hack2", 128), ("hack4, form P", 128)]
)
def test_pages_of_other_lengths(name: str, page_tokens: int) -> None:
    layout, draw = PACKED[name], np.random.default_rng(0)
    k, v = (draw.standard_normal((5, 1, 2, page_tokens, 64)).astype(jnp.bfloat16) for _ in "kv")
    q, positions, tables = (
        jnp.asarray(draw.standard_normal((3, 1, 4, 64)), jnp.float32),
        jnp.asarray([page_tokens + 7, page_tokens - 1, -1], jnp.int32),
        jnp.asarray([[3, 0], [1, 99], [2, 4]], jnp.int32),
    )
    x = Inputs(q, positions, jnp.ones(3, jnp.int32), seal(layout, k, v), tables)
    got, reference = (normalize(attend(op, layout, Case((), ()), x, layer=0, quickly=True)) for op in BOTH)
    homomorphic = not isinstance(layout, Kivi)
    np.testing.assert_allclose(got, reference, atol=2e-3 if homomorphic else 2e-6)


@needs_compiler
@pytest.mark.parametrize("page_tokens", [32, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tiles_of_other_lengths(dtype: Any, page_tokens: int) -> None:
    draw = np.random.default_rng(0)
    k, v = (jnp.asarray(draw.standard_normal((5, 2, page_tokens, 64)), dtype) for _ in "kv")
    pool = Dense(dtype).pool_of(k, v)
    q = jnp.asarray(draw.standard_normal((3, page_tokens, 4, 64)), jnp.float32)
    positions = jnp.asarray([page_tokens, page_tokens + 5, -1], jnp.int32)
    options = {"counts": jnp.asarray([page_tokens, page_tokens - 5, 0], jnp.int32), "scale": 0.125, "window": 50}
    tables = jnp.asarray([[3, 0], [1, 4], [2, 4]], jnp.int32)
    got, reference = (
        normalize(paged_prefill(q, positions, pool, 0, tables, layout=Dense(dtype), backend=backend, **options))
        for backend in ("native", "reference")
    )
    np.testing.assert_allclose(got, reference, atol=2e-6)


def traced_anew(case: Case, x: Inputs) -> Attended:
    """Backend `native`, as in a process that has traced nothing yet."""
    options = {"scale": case.scale, "counts": x.counts, "backend": "native"}
    return jax.jit(lambda q: paged_decode(q, x.positions, x.pool, 1, x.tables, **options))(x.q)


@pytest.fixture
def build_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As in a process that has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_registered", {})
    monkeypatch.setattr(build, "_failed", set())
    cached = (build.compiler, build.identity, build._folder)
    for function in cached:
        function.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


def test_without_a_compiler_the_reference_runs(build_anew: pytest.MonkeyPatch) -> None:
    build_anew.setenv("JAXSERVE_NATIVE", "0")
    assert resolve(None) == "reference"
    assert isinstance(float_layout(jnp.float16, None), Columns)
    case = Case(positions=(100, 3), counts=(1, 1))
    x = inputs(case)
    np.testing.assert_allclose(normalize(traced_anew(case, x)), expected(case, x, 1), atol=2e-6)


def test_a_compiler_that_fails_is_reported_and_the_reference_runs(
    build_anew: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such machine' >&2\nexit 1\n")
    broken.chmod(0o755)
    build_anew.setenv("CC", str(broken))
    case = Case(positions=(100, 3), counts=(1, 1))
    x = inputs(case)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(normalize(traced_anew(case, x)), expected(case, x, 1), atol=2e-6)
        traced_anew(case, x)
    assert [record.getMessage().count("no such machine") for record in caplog.records] == [1]
