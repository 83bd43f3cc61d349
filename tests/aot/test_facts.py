"""Facts read from small programs compiled for H200, where the right answer is known."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.aot import AotUnavailableError, Facts, compile_for, hlo, ptx, targets

pytestmark = pytest.mark.hopper


def facts(function, *shapes: tuple[int, ...], donate=(), dump: Path | None = None) -> Facts:
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    try:
        return compile_for(targets()["h200"], function, args, donate, dump)
    except AotUnavailableError as error:
        pytest.skip(str(error))


def test_target() -> None:
    h200 = targets()["h200"]
    assert h200.arch == "sm_90a"
    assert h200.memory_bytes == 151_397_597_184 and h200.bytes_per_s == 4.8e12


def test_products_memory_and_registers(tmp_path: Path) -> None:
    def mlp(x, up, down):
        return jax.nn.silu(x @ up) @ down

    got = facts(mlp, (64, 512), (512, 2048), (2048, 512), dump=tmp_path)
    assert got.dot_flops == 2 * 2 * 64 * 512 * 2048
    assert got.argument_bytes == 2 * (64 * 512 + 2 * 512 * 2048)
    assert got.output_bytes == 2 * 64 * 512
    kernels = ptx.kernels(tmp_path, targets()["h200"].arch)
    assert any(kernel.matrix for kernel in kernels.values())
    assert all(kernel.registers > 0 and kernel.spill_bytes == 0 for kernel in kernels.values())


def test_aliases_and_copies() -> None:
    def update(pool, x):
        return pool.at[3].set(x), x * 2

    in_place = facts(update, (16, 1024, 1024), (1024, 1024), donate=(0,))
    assert in_place.aliases == {"0": 0}
    assert not in_place.copies(4 << 20)
    copied = facts(update, (16, 1024, 1024), (1024, 1024))
    assert copied.aliases == {}
    assert sum(copy.bytes for copy in copied.copies(4 << 20)) == 16 * 1024 * 1024 * 2


def test_collectives() -> None:
    try:
        mesh = jax.sharding.Mesh(targets()["h200"].devices(2), ("tp",))
    except AotUnavailableError as error:
        pytest.skip(str(error))

    def array(shape: tuple[int, int], *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    product = jax.jit(lambda x, w: x @ w, out_shardings=whole)
    text = product.lower(array((64, 512), None, "tp"), array((512, 512), "tp", None)).compile().as_text() or ""
    assert hlo.collectives(text) == {"all-reduce": 1}
    assert hlo.dot_flops(text) == 2 * 64 * 256 * 512
