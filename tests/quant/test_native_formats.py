"""Weights in the formats of CPUs are the ones they were made of, and products with them those of the plain matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.quant import dequantize, linear, quantize, take
from pallas_kernels.native import build

FORMATS = ["panels", "table"]
SHAPES = [(256, 512), (100, 37), (576, 96), (1, 1)]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stored", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_they_hold_every_number(shape: tuple[int, int], stored: np.dtype, name: str) -> None:
    """Weights that bfloat16 holds take half the bytes."""
    weight = draw(*shape).astype(stored).astype(np.float32)
    held = quantize(name, weight)
    np.testing.assert_array_equal(dequantize(held), weight)
    on_device = quantize(name, jnp.asarray(weight))
    np.testing.assert_array_equal(dequantize(on_device), weight)
    assert held.codes.itemsize == np.dtype(stored).itemsize


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stored", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
def test_the_product_is_that_of_the_matrix(rows: int, shape: tuple[int, int], stored: np.dtype, name: str) -> None:
    x, weight, bias = draw(rows, shape[0], seed=1), draw(*shape).astype(stored).astype(np.float32), draw(shape[1])
    held = jax.tree.map(jnp.asarray, quantize(name, weight))
    got = jax.jit(linear)(x, held, jnp.asarray(bias))
    exact = x.astype(np.float64) @ weight + bias
    np.testing.assert_allclose(got, exact, rtol=0, atol=2e-6 * shape[0] ** 0.5 * 4)


@pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("name", FORMATS)
def test_the_bits_of_a_row_do_not_depend_on_the_others(name: str) -> None:
    x, held = draw(70, 256, seed=1), jax.tree.map(jnp.asarray, quantize(name, draw(256, 512)))
    product = jax.jit(linear)
    crowd = np.asarray(product(x, held))
    for first, count in ((0, 1), (3, 2), (5, 13), (1, 64)):
        np.testing.assert_array_equal(product(x[first : first + count], held), crowd[first : first + count])


@pytest.mark.parametrize("name", FORMATS)
def test_without_kernels_the_matrix_is_put_together_again(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(build, "target", lambda *_: None)
    x, weight = draw(5, 64), draw(64, 40)
    held = jax.tree.map(jnp.asarray, quantize(name, weight))
    np.testing.assert_allclose(linear(x, held), x @ weight, atol=1e-4)
    half = x.astype(jnp.bfloat16)
    assert linear(half, held).dtype == jnp.bfloat16


@pytest.mark.parametrize("stored", [np.float32, jnp.bfloat16])
def test_a_table_gives_its_rows(stored: np.dtype) -> None:
    rows = draw(50, 48).astype(stored).astype(np.float32)
    held = jax.tree.map(jnp.asarray, quantize("table", rows.T))
    ids = jnp.array([3, 0, 49, 3])
    np.testing.assert_array_equal(take(held, ids), rows[np.asarray(ids)])
    np.testing.assert_array_equal(take(jnp.asarray(rows), ids), rows[np.asarray(ids)])
