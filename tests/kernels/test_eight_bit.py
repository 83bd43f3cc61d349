"""8-bit codes: how far they are from what was encoded, whatever it was."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.layouts import Fp8, Int8
from pallas_kernels.layouts.codes import OCTAVE

Codes = tuple[jax.Array, ...]
int8, fp8 = jax.jit(Int8().encode), jax.jit(Fp8().encode)
TOKENS = st.lists(st.lists(st.floats(-(2.0**100), 2.0**100), min_size=8, max_size=8), min_size=2, max_size=2)


def decode(encoded: Codes) -> np.ndarray:
    codes, scales, *zeros = (np.asarray(x, np.float64) for x in encoded)
    return codes * scales[..., None] + (zeros[0][..., None] if zeros else 0)


def error(encoded: Codes, x: np.ndarray) -> np.ndarray:
    return np.abs(decode(encoded) - x)


@given(TOKENS)
@settings(max_examples=100, deadline=None)
def test_int8_is_off_by_half_a_step_of_the_tokens_range(tokens: list[list[float]]) -> None:
    x = np.array(tokens, np.float32)
    codes = int8(x)
    span = np.ptp(x.astype(np.float64), axis=-1)
    # The zero is rounded to bfloat16, which can lengthen the longer half of the range by 1/256 of the zero.
    step = (span / 2 + np.abs(x).max(-1) / 256) / 127 * 1.004
    assert np.all(error(codes, x) <= step[:, None] / 2 + 1e-6 * np.abs(x).max() + 1e-37)


@given(TOKENS)
@settings(max_examples=100, deadline=None)
def test_fp8_is_off_by_a_sixteenth_of_the_number(tokens: list[list[float]]) -> None:
    x = np.array(tokens, np.float32)
    codes = fp8(x)
    scale = np.asarray(codes[1], np.float64)[:, None]
    smallest = 2.0**-9  # the step of the subnormal codes
    assert np.all(error(codes, x) <= np.maximum(np.abs(x) / 16, scale * smallest / 2) * 1.001 + 1e-37)


def squared_error(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    codes = np.asarray(jnp.asarray(x / scale[:, None]).astype(jnp.float8_e4m3fn), np.float64)
    return np.sum((codes * scale[:, None] - x) ** 2, axis=-1)


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_no_fp8_scale_that_fits_would_be_better(channels: int) -> None:
    x = np.random.default_rng(channels).standard_normal((500, channels)).astype(np.float32)
    scale = np.asarray(fp8(x)[1], np.float64)
    others = [np.asarray(jnp.asarray(np.abs(x).max(-1) / top).astype(jnp.bfloat16), np.float64) for top in OCTAVE]
    errors = np.stack([squared_error(x, other) for other in others])
    # The choice is made on errors that were cut to a 1,024th of a power of two.
    assert np.all(squared_error(x, scale) < 1.02 * errors.min(axis=0))
    assert np.mean(squared_error(x, scale)) < 0.87 * np.mean(errors[0])


def test_an_error_along_a_vector_can_be_avoided() -> None:
    x = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    plain, across = (decode(jax.jit(partial(Fp8().encode, along=along))(x)) - x for along in (0, 32))
    assert np.mean(np.sum(across * unit, axis=-1) ** 2) < 0.25 * np.mean(np.sum(plain * unit, axis=-1) ** 2)
    assert np.mean(across**2) < 1.2 * np.mean(plain**2)


def test_a_vector_has_the_same_fp8_scale_alone_and_in_a_crowd() -> None:
    encode = partial(Fp8().encode, along=32)
    x = jax.random.normal(jax.random.key(0), (300, 5, 64))
    crowd = jax.jit(encode)(x)
    for one in (0, 137, 299):
        alone = jax.jit(encode)(x[one, 2])
        assert all(np.array_equal(a, b[one, 2]) for a, b in zip(alone, crowd, strict=True))
    doubled = jax.jit(lambda y: encode(y * 2))(x)
    assert np.array_equal(doubled[0], crowd[0]) and np.array_equal(doubled[1], 2 * crowd[1])


def test_equal_numbers_are_exact() -> None:
    x = np.repeat(np.array([[0.0], [1.5], [-2.0]], np.float32), 64, axis=1)
    assert np.array_equal(decode(int8(x)), x)
    assert np.array_equal(decode(fp8(x))[0], x[0])


@pytest.mark.parametrize("encode", [int8, fp8])
def test_codes_stay_finite(encode) -> None:
    x = np.array([[np.nan, 1.0, -1.0, 2.0], [np.inf, -np.inf, 0.0, 1.0], [3.4e38, 3.4e38, 3.4e38, 3.4e38]], np.float32)
    codes = encode(x)
    assert all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in codes)
    assert abs(float(decode(codes)[0, 0])) < 0.02


def test_given_scales_are_used_and_clip() -> None:
    x = np.array([[1.0, -3.0, 1000.0]], np.float32)
    codes = jax.jit(Fp8().encode)(x, jnp.float32(0.5))
    assert np.array_equal(codes[1], jnp.full((1,), 0.5, jnp.bfloat16))
    assert np.array_equal(decode(codes), [[1.0, -3.0, 224.0]])


@pytest.mark.parametrize("code", [Int8(), Fp8()])
def test_every_code_survives_as_bits(code: Int8 | Fp8) -> None:
    bits = jnp.arange(256, dtype=jnp.uint8)
    codes = jax.lax.bitcast_convert_type(bits, code.dtype)
    wanted = np.asarray(codes, np.float32)
    got = np.asarray(jax.jit(lambda x: code.from_bits(code.to_bits(x)))(codes))
    real = np.isfinite(wanted)
    assert real.sum() >= 254 and np.array_equal(got[real], wanted[real])
