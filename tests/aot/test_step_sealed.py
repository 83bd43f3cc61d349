"""The step programs of an 8B Llama's layers with sealed KV, compiled for H200: both pools in place, no spills, integer
products where a format computes on its codes. KV_FORMATS=all compiles them for every format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxserve.aot import AotUnavailableError, compile_for, ptx, targets
from jaxserve.aot.steps import LLAMA_8B, step_functions
from jaxserve.engine.step import forward_name, seal_name
from jaxserve.kv import SealedFormat, formats
from tests.kv_formats import chosen

pytestmark = pytest.mark.hopper

ROWS, TILES, PAGES, LAYERS = 64, 8, 1024, 2
MIB = 1 << 20
"""A copy of this size is of activations at most: a layer's share of a pool has 40 MiB and more, a matrix 8 and more."""


def cases(rows_and_tiles: dict[str, list[tuple[int, int]]]) -> list[tuple[str, int, int]]:
    """Format, rows and tiles: those given, or both sections for each format that the environment names."""
    names = chosen(*rows_and_tiles)
    both = [(ROWS, 0), (ROWS, TILES)]
    wanted = rows_and_tiles if names == list(rows_and_tiles) else dict.fromkeys(names, both)
    sealed = [name for name in wanted if isinstance(formats.get(name), SealedFormat)]
    return [(name, *shape) for name in sealed for shape in wanted[name]]


@pytest.mark.parametrize(("name", "rows", "tiles"), cases({"hack4": [(ROWS, TILES)], "kivi2": [(ROWS, 0)]}))
def test_forward(name: str, rows: int, tiles: int, tmp_path: Path) -> None:
    config = replace(LLAMA_8B, layers=LAYERS, windows=(None,) * LAYERS)
    # Rotating keys and queries is work around the kernels; one format shows that it needs no copies.
    rotation = "hadamard" if name == "hack4" else "none"
    functions = step_functions(config, rows=rows, tiles=TILES, pages=PAGES, kv_format=name, key_rotation=rotation)
    program = next(p for p in functions.programs() if p.name == forward_name(rows, tiles))
    try:
        facts = compile_for(targets()["h200"], program.function, program.args, program.donate, dump=tmp_path)
        kernels = ptx.kernels(tmp_path, targets()["h200"].arch)
    except (AotUnavailableError, ptx.PtxasMissingError) as error:
        pytest.skip(str(error))
    pools = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(functions.kv.pools))
    assert facts.aliased_bytes >= pools
    assert not facts.copies(MIB)
    assert facts.temporary_bytes < 100 * MIB
    assert not {kernel.name: kernel.spill_bytes for kernel in kernels.values() if kernel.spill_bytes}
    for op in ("paged_decode", "paged_prefill") if tiles else ("paged_decode",):
        # One walk over sealed pages, one over 16-bit pages; one kernel for all layers.
        operands = sorted(_operands(k) for k in kernels.values() if k.name.startswith(op))
        assert operands == (["bf16", "s8"] if name.startswith("hack") else ["bf16", "bf16"]), op


def _operands(kernel: ptx.Kernel) -> str:
    """The one type of operands of a kernel's matrix products."""
    (operands,) = {kind.split(".")[-1 if "wgmma" in kind else -2] for kind in kernel.matrix}
    return operands


def test_seal(tmp_path: Path) -> None:
    config = replace(LLAMA_8B, layers=LAYERS, windows=(None,) * LAYERS)
    functions = step_functions(config, rows=ROWS, tiles=TILES, pages=PAGES, kv_format="hack2")
    program = next(p for p in functions.programs() if p.name == seal_name(16))
    try:
        facts = compile_for(targets()["h200"], program.function, program.args, program.donate)
    except AotUnavailableError as error:
        pytest.skip(str(error))
    pools = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(functions.kv.pools))
    assert facts.aliased_bytes >= pools
    assert not facts.copies(MIB)
    assert facts.temporary_bytes < 10 * MIB
