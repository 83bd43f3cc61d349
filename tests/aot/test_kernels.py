"""Every Triton kernel compiled for H200: no spills, tensor cores, and step programs that update the pool in place."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from jaxserve.aot import AotUnavailableError, Facts, compile_for, ptx, targets
from jaxserve.kv import attend_layer, build_meta, formats, kv_shapes
from jaxserve.types import KVGroup
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill

pytestmark = pytest.mark.hopper

PAGES = 4096


class Spec(NamedTuple):
    scale: float = 0.08
    window: int | None = None
    softcap: float | None = None


def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def compiled(function, args, donate=(), dump: Path | None = None) -> Facts:
    try:
        return compile_for(targets()["h200"], function, args, donate, dump)
    except AotUnavailableError as error:
        pytest.skip(str(error))


WIDE = [(paged_decode, 64, 1, (32, 8), 128, {}), (paged_prefill, 8, 64, (32, 8), 128, {})]
NARROW = [
    (paged_decode, 2, 4, (9, 3), 64, {"window": 512}),
    (paged_prefill, 8, 64, (4, 1), 64, {"window": 512, "softcap": 30.0}),
]


@pytest.mark.parametrize(
    ("name", "op", "rows", "q_tokens", "heads", "head_dim", "options"),
    [(name, *shape) for name in ("bf16", "f32", "int8", "fp8_e4m3") for shape in WIDE]
    # Half the registers: one format with 16 bits and one with 8 show that masks cost no spills.
    + [(name, *shape) for name in ("bf16", "int8") for shape in NARROW],
)
def test_kernel(name: str, op, rows, q_tokens, heads, head_dim, options, tmp_path: Path) -> None:
    layout = formats.get(name, backend="triton").layout

    def call(q, positions, counts, pool, tables):
        return op(q, positions, pool, 1, tables, counts=counts, scale=0.1, layout=layout, backend="triton", **options)

    args = (
        array("float32" if name == "f32" else "bfloat16", rows, q_tokens, heads[0], head_dim),
        array("int32", rows),
        array("int32", rows),
        layout.pool(PAGES, 2, heads[1], 64, head_dim),
        array("int32", rows, 128),
    )
    facts = compiled(call, args, dump=tmp_path)
    kernel = ptx.kernels(tmp_path, targets()["h200"].arch)[op.__name__]
    assert kernel.spill_bytes == 0
    assert not facts.copies()
    if name != "f32":
        assert all("bf16" in kind for kind in kernel.matrix) and kernel.matrix


@pytest.mark.parametrize(
    ("op", "rows", "q_tokens", "heads", "head_dim", "options"),
    [
        (paged_decode, 64, 1, (32, 8), 128, {}),
        (paged_prefill, 8, 64, (32, 8), 128, {}),
        (paged_prefill, 4, 64, (9, 3), 64, {"window": 512, "softcap": 30.0}),
    ],
)
def test_mosaic_kernel(op, rows, q_tokens, heads, head_dim, options, tmp_path: Path) -> None:
    """Products by wgmma, pages by the bulk copy engine, no spills, no copy of the pool."""

    def call(q, positions, counts, pool, tables):
        return op(q, positions, pool, 1, tables, counts=counts, scale=0.1, backend="mosaic", **options)

    args = (
        array("bfloat16", rows, q_tokens, heads[0], head_dim),
        array("int32", rows),
        array("int32", rows),
        array("bfloat16", PAGES, 2, 2, heads[1], 64, head_dim),
        array("int32", rows, 128),
    )
    facts = compiled(call, args, dump=tmp_path)
    kernel = ptx.kernels(tmp_path, targets()["h200"].arch)[f"{op.__name__}_mosaic_gpu_kernel"]
    assert kernel.spill_bytes == 0
    assert kernel.matrix and all(kind.startswith("wgmma.") and "bf16" in kind for kind in kernel.matrix)
    assert any("cp.async.bulk.tensor" in path.read_text() for path in tmp_path.glob(f"{op.__name__}*.ptx"))
    assert not facts.copies(16 << 20)


@pytest.mark.parametrize(
    ("name", "backend", "tiles"),
    [
        ("bf16", "triton", 0),
        ("bf16", "triton", 8),
        ("bf16", "reference", 8),
        ("int8", "triton", 8),
        ("fp8_e4m3", "triton", 8),
    ],
)
def test_layers_update_the_pool_in_place(name: str, backend: str, tiles: int) -> None:
    """Two layers of an 8B Llama's attention, 64 decode rows and 512 prefill tokens."""
    options = {"key_rotation": "hadamard"} if name == "fp8_e4m3" else {}
    rows, heads, kv_heads, head_dim = 64, 32, 8, 128
    group = KVGroup(layers=(0, 1), kv_heads=kv_heads, head_dim=head_dim)
    kv = kv_shapes([group], [formats.get(name, backend=backend, **options)], [(PAGES,)], rows, 8192)
    tokens = rows + tiles * 64

    def step(kv, q, k, v, *ints):
        meta = build_meta(kv.tables, *ints)
        for layer in range(2):
            kv, out = attend_layer(kv, 0, layer, q, k, v, meta, Spec())
            q, k, v = q + out, k + out[:, :kv_heads], v - out[:, :kv_heads]
        return kv, q

    ints = [array("int32", n) for n in (rows, rows, rows, tiles, tiles, tiles)]
    flat = [array("bfloat16", tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    facts = compiled(step, (kv, *flat, *ints), donate=(0,))
    pool = jax.tree.leaves(kv.pools[0])
    assert [facts.aliases[str(i)] for i in range(len(pool))] == list(range(len(pool)))
    assert facts.aliased_bytes >= sum(x.size * x.dtype.itemsize for x in pool)
    assert not facts.copies(16 << 20)
    # The reference walk reads two pages of each row at a time, as float32.
    fetched = 2 * rows * 2 * kv_heads * 64 * head_dim * 4 if backend == "reference" else 0
    assert facts.temporary_bytes < fetched + (64 << 20)


@pytest.mark.parametrize("tiles", [1, 32])
def test_chunks_on_cudnn(tiles: int) -> None:
    """Chunks are one call of cuDNN, which reads keys where they are; the pages before them are the Triton kernel's.
    What cuDNN makes of it is decided on the GPU."""
    heads, kv_heads, head_dim = 32, 8, 128
    group = KVGroup(layers=(0,), kv_heads=kv_heads, head_dim=head_dim)
    kv = kv_shapes([group], [formats.get("bf16", backend="cudnn")], [(PAGES,)], 64, 8192)

    def step(kv, q, k, v, *ints):
        nobody = jnp.zeros(0, jnp.int32)
        return attend_layer(kv, 0, 0, q, k, v, build_meta(kv.tables, nobody, nobody, nobody, *ints), Spec())

    ints = [array("int32", tiles) for _ in range(3)]
    flat = [array("bfloat16", tiles * 64, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    facts = compiled(step, (kv, *flat, *ints), donate=(0,))
    assert facts.custom_calls["__cudnn$fmhaSoftmax"] == 1
    assert not facts.copies(16 << 20)
