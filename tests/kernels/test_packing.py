"""Codes in bytes: what packing and the quantizers promise for any input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.layouts.packing import TINY, Affine, affine, clipped, pack, quantize, quantize8, unpack

FLOATS = st.floats(-100, 100, width=32)


def vectors(*sizes: int) -> st.SearchStrategy[list[float]]:
    """Few sizes: each is a program of its own for every operation."""
    return st.sampled_from(sizes).flatmap(lambda size: st.lists(FLOATS, min_size=size, max_size=size))


@given(data=st.data(), bits=st.sampled_from([2, 4, 8]), bytes_=st.sampled_from([1, 7, 40]))
@settings(max_examples=60, deadline=None)
def test_packing_is_planar_and_reversible(data: st.DataObject, bits: int, bytes_: int) -> None:
    fields = 8 // bits
    n = bytes_ * fields
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n)), np.uint8)
    packed = np.asarray(pack(jnp.asarray(codes), bits))
    assert packed.shape == (bytes_,)
    for field in range(fields):
        np.testing.assert_array_equal(
            (packed.astype(int) >> (bits * field)) % 2**bits, codes[field * bytes_ :][:bytes_]
        )
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits), codes)


@given(x=vectors(2, 5, 64), bits=st.sampled_from([2, 4, 8]))
@settings(max_examples=100, deadline=None)
def test_quantization_errs_by_half_a_step(x: list[float], bits: int) -> None:
    values = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    to = affine(jnp.asarray(values, jnp.bfloat16), 0, bits)
    codes = np.asarray(quantize(jnp.asarray(values, jnp.float32), to, bits), np.float64)
    scale, minimum = float(to.scale), float(to.minimum)
    assert minimum == values.min()
    # A stored scale may be 2^-9 smaller than the exact one, and then the largest value is beyond the last code.
    beyond = (2**bits - 1) * scale * 2**-8
    assert np.all(np.abs(codes * scale + minimum - values) <= scale / 2 * (1 + 1e-5) + beyond)


def test_equal_values_are_kept() -> None:
    to = affine(jnp.full((4,), 3.5, jnp.bfloat16), 0, 2)
    assert to == Affine(jnp.bfloat16(1), jnp.bfloat16(3.5))
    np.testing.assert_array_equal(quantize(jnp.full((4,), 3.5), to, 2), 0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_stay_finite_over_the_whole_range(bits: int) -> None:
    largest = float(jnp.finfo(jnp.bfloat16).max)
    to = affine(jnp.asarray([-largest, 0, largest], jnp.bfloat16), 0, bits)
    assert jnp.isfinite(to.scale)
    codes = quantize(jnp.asarray([-largest, largest]), to, bits)
    assert jnp.all(jnp.isfinite(codes * to.scale.astype(jnp.float32) + to.minimum.astype(jnp.float32)))


def clip_error(values: np.ndarray, to: Affine) -> float:
    """Sum of squared errors of 2-bit codes of `values` [n]."""
    codes = np.asarray(quantize(jnp.asarray(values, jnp.float32), to, 2), np.float64)
    return float(np.sum((codes * float(to.scale) + float(to.minimum) - values) ** 2))


@given(x=vectors(32))
@settings(max_examples=100, deadline=None)
def test_a_clipped_range_errs_no_more_than_the_whole(x: list[float]) -> None:
    values = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    given = jnp.asarray(values, jnp.float32)
    # The choice is made on a grid of 960 steps, and both quantizers are stored as bfloat16.
    slack = len(values) * (np.ptp(values) * 0.01 + np.abs(values).max() * 2**-8) ** 2
    assert clip_error(values, clipped(given, 0)) <= 1.05 * clip_error(values, affine(given, 0, 2)) + slack


def test_a_clipped_range_nearly_halves_the_error_of_normal_values() -> None:
    """The best evenly spaced four levels for a normal distribution err by 0.119 of its variance."""
    x = np.random.default_rng(0).standard_normal((400, 64)).astype(np.float32)
    found = [sum(clip_error(row, fit(jnp.asarray(row), 0)) for row in x[:40]) / x[:40].size for fit in (clipped, whole)]
    assert found[0] < 0.12 and found[1] > 1.6 * found[0]


def whole(x: jax.Array, axis: int) -> Affine:
    return affine(x, axis, 2)


def test_a_clipped_range_depends_on_its_own_values_alone() -> None:
    """Not on their order, nor on what stands beside them, nor on the program."""
    x = jax.random.normal(jax.random.key(1), (64, 33))
    every = jax.jit(clipped, static_argnums=1)(x, 0)
    for column in (0, 32):
        mixed = jax.random.permutation(jax.random.key(2), x[:, column])
        alone = clipped(mixed, 0)
        assert (alone.scale, alone.minimum) == (every.scale[column], every.minimum[column])


def test_a_clipped_range_keeps_equal_values_and_stays_finite() -> None:
    assert clipped(jnp.full((4,), 3.5), 0) == Affine(jnp.bfloat16(1), jnp.bfloat16(3.5))
    largest = float(jnp.finfo(jnp.bfloat16).max)
    to = clipped(jnp.asarray([-largest, 0, largest], jnp.bfloat16), 0)
    assert jnp.isfinite(to.scale) and jnp.isfinite(to.minimum)


@given(x=vectors(32), shift=FLOATS)
@settings(max_examples=100, deadline=None)
def test_eight_bits_err_by_half_a_step(x: list[float], shift: float) -> None:
    values = jnp.asarray(x, jnp.float32) + shift
    (codes,), scale, center = quantize8(values)
    assert codes.dtype == jnp.int8
    rounding = 1e-6 * float(jnp.max(jnp.abs(values)))
    assert jnp.max(jnp.abs(scale * codes + center - values)) <= scale[0] / 2 + 128 * rounding + TINY


@pytest.mark.parametrize("value", [0.0, -3.25, 1e-37, 1e30])
def test_eight_bits_keep_a_constant_vector(value: float) -> None:
    (codes,), scale, center = quantize8(jnp.full((2, 16), value, jnp.float32))
    np.testing.assert_array_equal(scale * codes + center, jnp.full((2, 16), value, jnp.float32))


def test_eight_bits_look_at_one_vector_alone() -> None:
    """Split in arrays side by side or whole, alone or among others."""
    x = jax.random.normal(jax.random.key(0), (5, 64))
    (whole,), scale, center = quantize8(x)
    (left, right), *rest = quantize8(x[:, :32], x[:, 32:])
    np.testing.assert_array_equal(jnp.concatenate([left, right], axis=1), whole)
    (alone,), *single = quantize8(x[3:4])
    np.testing.assert_array_equal(alone, whole[3:4])
    for a, b, c in zip(rest, (scale, center), single, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(c, b[3:4])
