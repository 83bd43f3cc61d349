"""The kernels of packed pages compiled for H200: no spills, no copy of a pool, integer products on tensor cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.aot import ptx, targets
from pallas_kernels.layouts import FloatRows, Kivi, SealedLayout, hack
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill
from tests.aot.test_kernels import PAGES, array, compiled

pytestmark = pytest.mark.hopper

LAYOUTS = {
    "kivi2": Kivi(2),
    "kivi4": Kivi(4),
    "hack2": hack(2),
    "hack4": hack(4),
    "hack8": hack(8),
    "hack2, form P": hack(2, "P"),
}


@pytest.mark.parametrize(
    ("name", "op", "rows", "q_tokens", "heads", "head_dim"),
    [(name, *shape) for name in LAYOUTS for shape in ((paged_decode, 64, 1, (32, 8), 128),)]
    + [(name, *shape) for name in LAYOUTS for shape in ((paged_prefill, 8, 64, (32, 8), 128),)]
    # Fields of 16 channels, narrower than an integer product: read in pairs.
    + [(name, paged_decode, 2, 4, (9, 3), 64) for name in ("kivi2", "hack2")]
    + [(name, paged_prefill, 8, 64, (4, 1), 64) for name in ("kivi2", "hack2")]
    # Tiles and pages of 128 tokens.
    + [(name, paged_prefill, 8, 128, (32, 8), 128) for name in ("kivi2", "hack4")],
)
def test_kernel(name: str, op, rows: int, q_tokens: int, heads, head_dim: int, tmp_path: Path) -> None:
    layout: SealedLayout = LAYOUTS[name]

    def call(q, positions, counts, pool, tables):
        return op(q, positions, pool, 1, tables, counts=counts, scale=0.1, backend="triton", layout=layout)

    shapes = layout.shapes(heads[1], max(q_tokens, 64), head_dim)
    args = (
        array("bfloat16", rows, q_tokens, heads[0], head_dim),
        array("int32", rows),
        array("int32", rows),
        {key: array(one.dtype.name, PAGES, 2, *one.shape) for key, one in shapes.items()},
        array("int32", rows, 128),
    )
    facts = compiled(call, args, dump=tmp_path)
    kernel = ptx.kernels(tmp_path, targets()["h200"].arch)[op.__name__]
    assert kernel.spill_bytes == 0
    assert not facts.copies()
    operands = ".s8.s8" if name.startswith("hack") else ".bf16.bf16"
    assert kernel.matrix and all(operands in kind for kind in kernel.matrix)


@pytest.mark.parametrize(("op", "rows", "q_tokens"), [(paged_decode, 64, 1), (paged_prefill, 8, 64)])
@pytest.mark.parametrize(
    ("layout", "keys", "values"),
    [
        (FloatRows(), 96, 64),
        (FloatRows(), 112, 48),  # blocks of 16 channels
        (hack(4), 128, 64),
        (hack(4, group=32), 64, 32),
        (hack(2), 64, 64),
        (Kivi(4, group=32), 64, 32),
    ],
)
def test_leading_channels(layout: SealedLayout, keys: int, values: int, op, rows: int, q_tokens: int, tmp_path: Path):
    """Pages that hold some channels of heads of 128: no more is read, and nothing spills."""

    def call(q, positions, counts, pool, tables):
        return op(q, positions, pool, 1, tables, counts=counts, scale=0.1, backend="triton", layout=layout)

    shapes = layout.shapes(8, 64, keys, values)
    pool = {key: array(one.dtype.name, PAGES, 2, *one.shape) for key, one in shapes.items()}
    ints = (array("int32", rows), array("int32", rows))
    args = (array("bfloat16", rows, q_tokens, 32, keys), *ints, pool, array("int32", rows, 128))
    facts = compiled(call, args, dump=tmp_path)
    kernel = ptx.kernels(tmp_path, targets()["h200"].arch)[op.__name__]
    assert kernel.spill_bytes == 0
    assert kernel.matrix
    assert not facts.copies()


@pytest.mark.parametrize(("op", "q_tokens"), [(paged_decode, 1), (paged_prefill, 64)])
def test_a_list_of_16_bit_pages(op, q_tokens: int, tmp_path: Path) -> None:
    """What a format with sealed pages reads beside them: a few pages from anywhere in the sequence."""
    rows = 8

    def call(q, positions, counts, pool, tables, places):
        return op(q, positions, pool, 1, tables, counts=counts, places=places, scale=0.1, backend="triton")

    pool = array("bfloat16", PAGES, 2, 2, 8, 64, 128)
    lists = [array("int32", rows, 3) for _ in range(2)]
    args = (array("bfloat16", rows, q_tokens, 32, 128), array("int32", rows), array("int32", rows), pool, *lists)
    facts = compiled(call, args, dump=tmp_path)
    assert ptx.kernels(tmp_path, targets()["h200"].arch)[op.__name__].spill_bytes == 0
    assert not facts.copies()
