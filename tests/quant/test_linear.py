"""The one matrix product: real float32, int8 weights, and rows whose bits do not depend on their number."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.quant import LinearContext, dequantize, linear, quantize, weight_formats


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_float32_is_real_float32():
    x, w, bias = draw(9, 300), draw(300, 40, seed=1), draw(40, seed=2)
    exact = x.astype(np.float64) @ w + bias
    np.testing.assert_allclose(linear(x, jnp.asarray(w), jnp.asarray(bias)), exact, rtol=0, atol=3e-5)


def test_sums_are_float32_and_the_result_has_the_dtype_of_x():
    x, w = jnp.ones((2, 4096), jnp.bfloat16), jnp.ones((4096, 3), jnp.bfloat16)
    assert linear(x, w).dtype == jnp.bfloat16
    assert linear(x, w, out_dtype=jnp.float32).dtype == jnp.float32
    assert (linear(x, w, out_dtype=jnp.float32) == 4096).all()


@pytest.mark.parametrize("name", weight_formats())
@given(rows=st.integers(1, 70), columns=st.integers(1, 70), scale=st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=25)
def test_quantization_error_is_half_a_step(name, rows, columns, scale):
    weight = draw(rows, columns) * np.float32(scale)
    step = np.abs(weight).max(axis=0) / 127
    assert (np.abs(dequantize(quantize(name, weight)) - weight) <= 0.5001 * step).all()


def test_quantizing_on_host_and_device_agree():
    weight = draw(50, 20)
    host, device = quantize("int8", weight), quantize("int8", jnp.asarray(weight))
    assert isinstance(host.codes, np.ndarray)
    np.testing.assert_array_equal(host.codes, device.codes)
    np.testing.assert_allclose(host.scale, device.scale, rtol=1e-6)


def test_a_column_of_zeros_stays_zero():
    weight = draw(8, 3)
    weight[:, 1] = 0
    assert (dequantize(quantize("int8", weight))[:, 1] == 0).all()


def test_int8_product_equals_the_dequantized_one():
    x, weight = draw(5, 64), quantize("int8", draw(64, 32, seed=3))
    expected = x @ dequantize(weight)
    np.testing.assert_allclose(linear(x, jax.tree.map(jnp.asarray, weight)), expected, atol=1e-4)


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match="int7.*int8"):
        quantize("int7", draw(2, 2))


@pytest.mark.parametrize("quantization", [None, *weight_formats()])
@pytest.mark.parametrize("shape", [(256, 512), (100, 37), (576, 1536)])
def test_invariant_rows_have_the_same_bits_in_any_crowd(quantization, shape):
    weight = jnp.asarray(draw(*shape))
    weight = quantize(quantization, weight) if quantization else weight
    x, bias = draw(200, shape[0], seed=5), jnp.asarray(draw(shape[1]))
    product = jax.jit(partial(linear, ctx=LinearContext(invariant_rows=64)))
    crowd = np.asarray(product(x, weight, bias))
    for count in (1, 2, 16, 63, 64, 65, 128):
        assert np.array_equal(product(x[:count], weight, bias), crowd[:count])
    assert np.array_equal(product(x[100:101], weight, bias), crowd[100:101])
