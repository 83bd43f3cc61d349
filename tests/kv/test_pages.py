"""Whole pages and table entries: grants, copies, staging, and the wire form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from jaxserve.config import EngineConfig, fields_of
from jaxserve.kv import ABSENT, KVFormat, KVState, allocate, formats, kv_shapes
from jaxserve.kv.pages import copy_pages, gather_pages, grant, scatter_pages
from jaxserve.kv.wire import BadPageError, export_page, import_page
from jaxserve.types import KVGroup

WIDE = KVGroup(layers=(0, 2), kv_heads=2, head_dim=64)
GROUPS = [KVGroup(layers=(0, 2), kv_heads=2, head_dim=16), KVGroup(layers=(1,), kv_heads=1, head_dim=16, window=64)]


def ints(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


def state(dtype: str = "f32", backend: str = "triton") -> KVState:
    kv = allocate(kv_shapes(GROUPS, [formats.get(dtype, backend=backend)] * 2, [(6,), (4,)], 3, 200))
    rng = np.random.default_rng(0)
    pools = jax.tree.map(lambda x: jnp.asarray(abs(rng.standard_normal(x.shape)) * 9, x.dtype), kv.pools)
    return KVState(pools, kv.tables, kv.formats)


def test_shapes() -> None:
    kv = state("bf16")
    assert kv.pools[0].shape == (6, 2, 2, 2, 64, 16) and kv.pools[0].dtype == jnp.bfloat16
    assert kv.pools[1].shape == (4, 1, 2, 1, 64, 16)
    keys, values = kv_shapes(GROUPS, [formats.get("bf16", backend="reference")] * 2, [(6,), (4,)], 3, 200).pools[0]
    assert (keys.shape, values.shape) == ((6, 2, 2, 16, 64), (6, 2, 2, 64, 16)) and keys.dtype == jnp.uint16
    assert [t.shape for t in kv.tables] == [(1, 3, 4)] * 2
    assert all(np.all(np.asarray(t) == ABSENT) for t in kv.tables)


def test_grants_out_of_range_are_dropped() -> None:
    kv = jax.jit(grant, static_argnums=1)(state(), 1, ints(0, 0, 0), ints(2, 0, 3), ints(1, 3, 0), ints(3, 0, 2))
    table = np.asarray(kv.tables[1])[0]
    assert table[2, 1] == 3 and table[0, 3] == 0
    assert np.sum(table != ABSENT) == 2 and np.all(np.asarray(kv.tables[0]) == ABSENT)


def test_copies_are_in_place_and_exact() -> None:
    pool = state().pools[0]
    before = np.asarray(pool)
    copy = jax.jit(copy_pages, donate_argnums=0).lower(pool, ints(0, 0), ints(0, 0)).compile()
    assert copy.memory_analysis().alias_size_in_bytes == pool.nbytes
    after = np.asarray(copy(pool, ints(4, ABSENT), ints(1, ABSENT)))
    assert np.array_equal(after[1], before[4])
    assert np.array_equal(np.delete(after, 1, 0), np.delete(before, 1, 0))


def test_staging_round_trip() -> None:
    pool = state().pools[0]
    staged = gather_pages(pool, ints(5, 2, ABSENT))
    back = scatter_pages(jnp.zeros_like(pool), ints(0, 3, ABSENT), staged)
    assert np.array_equal(back[0], pool[5]) and np.array_equal(back[3], pool[2])
    assert not np.any(back[jnp.array([1, 2, 4, 5])])


@pytest.fixture(params=[name for name in formats.names() if not name.startswith("test-")])
def name(request: pytest.FixtureRequest) -> str:
    """Of each format there is."""
    return request.param


def pages_of(name: str, backend: str) -> tuple[KVFormat, list[Any]]:
    """The format and a page of each of its classes: random positive values, as a pool of bytes could hold them."""
    format = formats.get(name, backend=backend)
    rng = np.random.default_rng(0)
    payload = format.payload(WIDE, (1,) * len(format.kinds(WIDE)))
    # 0x3f3f is 0.75 in bfloat16 and 1.8 in float16; bytes up to it are finite in every type.
    pool = jax.tree.map(lambda x: np.frombuffer(rng.bytes(x.size * x.dtype.itemsize), np.uint8) & 0x3F, payload)
    pool = jax.tree.map(lambda bits, x: bits.view(x.dtype).reshape(x.shape), pool, payload)
    return format, [format.part(pool, cls) for cls in range(len(format.kinds(WIDE)))]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_wire_round_trip(name: str, backend: str) -> None:
    format, pages = pages_of(name, backend)
    for cls, page in enumerate(pages):
        header, back = import_page(format, WIDE, export_page(format, cls, page, b"chain"))
        assert (header.identity, header.format, header.cls) == (b"chain", name, cls)
        for sent, received in zip(jax.tree.leaves(page), jax.tree.leaves(back), strict=True):
            assert np.array_equal(received.view(np.uint8), sent.view(np.uint8))


def test_pages_of_another_size_are_refused(name: str) -> None:
    format, pages = pages_of(name, "reference")
    smaller = msgspec.structs.replace(WIDE, page_tokens=32)
    for cls, page in enumerate(pages):
        with pytest.raises(BadPageError, match="this pool needs"):
            import_page(format, smaller, export_page(format, cls, page, b""))


INTEGERS = ("k_codes", "v_codes", "k_sum", "v_sum")
"""Arrays of packed pages that hold no floats."""


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_pages_that_are_not_finite_are_refused(name: str, backend: str) -> None:
    """One number of all ones, which is NaN in every float type, in each array in turn. On CPUs floats are held as bits:
    what is not finite must be found all the same."""
    format, pages = pages_of(name, backend)
    for cls, page in enumerate(pages):
        leaves, tree = jax.tree.flatten_with_path(page)
        for index, (path, leaf) in enumerate(leaves):
            array = jax.tree_util.keystr(path, simple=True)
            poisoned = leaf.copy()
            poisoned.reshape(-1)[-1:].view(np.uint8)[:] = 0xFF
            bad = tree.unflatten(poisoned if i == index else other for i, (_, other) in enumerate(leaves))
            record = export_page(format, cls, bad, b"")
            if array in INTEGERS or (name == "int8" and array != "sides"):
                import_page(format, WIDE, record)
            else:
                with pytest.raises(BadPageError, match="not finite"):
                    import_page(format, WIDE, record)


def test_bad_records_are_refused() -> None:
    kv = state()
    record = export_page(kv.formats[0], 0, gather_pages(kv.pools[0], ints(3)), b"")
    flipped = bytearray(record)
    flipped[-1] ^= 1
    for bad, group, dtype, message in [
        (record[:-1], 0, "f32", "damaged"),
        (bytes(flipped), 0, "f32", "damaged"),
        (record, 1, "f32", "this pool needs"),
        (record, 0, "bf16", "in format 'f32', this pool is in 'bf16'"),
        (b"PNG" + record, 0, "f32", "not a KV page"),
        (record[:20], 0, "f32", "header"),
    ]:
        with pytest.raises(BadPageError, match=message):
            import_page(formats.get(dtype, backend="triton"), GROUPS[group], bad)
    nan = jnp.full((1, 2, 2, 2, 64, 16), jnp.nan)
    with pytest.raises(BadPageError, match="not finite"):
        import_page(kv.formats[0], GROUPS[0], export_page(kv.formats[0], 0, nan, b""))


def test_unknown_formats_are_named() -> None:
    with pytest.raises(ValueError, match="--kv-cache-dtype fp3 is not known; choose one of bf16, f16, f32, fp8, "):
        formats.get("fp3")


def test_every_format_is_an_option() -> None:
    """The config lists the formats, because it may not import them."""
    choices = fields_of(EngineConfig)["kv_cache_dtype"][1].metadata["choices"]
    shipped = [name for name in formats.choices() if not name.startswith("test-")]  # other tests register theirs
    sealing = [name for name in shipped if "channels" in formats.options(name) and name != "zeroc"]
    assert sorted(choices) == sorted(("auto", *shipped, *(f"zeroc+{name}" for name in sealing)))
    assert formats.get("fp8") == formats.get("fp8_e4m3") and formats.get("fp8").name == "fp8_e4m3"
