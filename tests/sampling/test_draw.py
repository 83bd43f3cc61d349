"""Filters and draws against references that sort, in exact integers where the code is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.sampling.draw import best, draw, inverse_cdf, masses
from jaxserve.sampling.thresholds import MASS_BITS, largest, top_k_threshold, top_p_threshold

WIDE = 5000
"""More than 64 blocks of 64, so that block maxima prune."""

jit_draw = jax.jit(draw)
jit_inverse = jax.jit(inverse_cdf)
jit_top_k = jax.jit(top_k_threshold)
jit_top_p = jax.jit(top_p_threshold)


def rows_with_ties(seed: int, rows: int, vocab: int, levels: int) -> np.ndarray:
    """float32 [rows, vocab] with about `levels` distinct values a row, both signs, zeros of both signs."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=levels).astype(np.float32) * 10
    values[: 2 * (levels > 4)] = [0.0, -0.0][: 2 * (levels > 4)]
    return values[rng.integers(levels, size=(rows, vocab))]


@pytest.mark.parametrize("vocab", [7, 64, 300, WIDE])
@pytest.mark.parametrize("levels", [3, 100, 100_000])
def test_top_k_is_the_kth_largest_value(vocab, levels):
    logits = rows_with_ties(levels, 6, vocab, levels)
    logits[5, : vocab // 2] = -np.inf
    for ks in ([1, 2, 5, 0, 3, 1], [1, 65, 299, 0, vocab, vocab - 1]):
        got = np.asarray(jit_top_k(logits, np.array(ks, np.int32)))
        for row, k, threshold in zip(logits, ks, got, strict=True):
            assert threshold == (np.sort(row)[-k] if 0 < k < vocab else -np.inf)


@pytest.mark.parametrize("vocab", [5, 64, WIDE])
def test_largest_is_the_head_of_a_sort(vocab):
    logits = rows_with_ties(vocab, 4, vocab, 200)
    assert np.array_equal(largest(jnp.asarray(logits), 64), np.sort(logits, axis=1)[:, ::-1][:, :64])


def nucleus(mass: np.ndarray, p: float) -> int:
    """The least mass that a sort of `mass` keeps, cut where the sum first reaches p of the total."""
    falling = np.sort(mass.astype(np.int64))[::-1]
    need = np.clip(np.ceil(np.float32(p) * np.float32(mass.sum())), 1, mass.sum())
    return int(falling[np.searchsorted(np.cumsum(falling), need)])


@pytest.mark.parametrize("vocab", [5, WIDE])
@pytest.mark.parametrize("peak", [0.0, 3.0, 20.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(vocab, peak):
    logits = (np.random.default_rng(1).normal(size=(6, vocab)) * peak).astype(np.float32)
    ones, zeros = np.ones(6, np.float32), np.zeros(6, np.float32)
    mass = np.asarray(masses(logits, logits.max(axis=1), ones, zeros, zeros - np.inf))
    for ps in ([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0], [1.0, 1.0, 0.99999, 1.0, 1.0, 1.0]):
        got = np.asarray(jit_top_p(mass, np.array(ps, np.float32)))
        assert got.tolist() == [nucleus(row, p) if p < 1 else 1 for row, p in zip(mass, ps, strict=True)]


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("vocab", [1, 16, WIDE])
def test_masses_are_the_softmax_and_their_sum_fits(vocab, scale):
    logits = (np.random.default_rng(2).normal(size=(3, vocab)) * scale).astype(np.float32)
    temperature = np.array([0.5, 1.0, 2.0], np.float32)
    mass = np.asarray(masses(logits, logits.max(axis=1), temperature, np.zeros(3, np.float32), np.full(3, -np.inf)))
    total = mass.sum(axis=1, dtype=np.int64)
    assert (total < 1 << MASS_BITS).all() and (mass >= 0).all()
    exact = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature[:, None])
    exact /= exact.sum(axis=1, keepdims=True)
    # A token loses less than one unit, of at least 2^28 in the row, and float32 rounds its weight.
    np.testing.assert_allclose(mass / total[:, None], exact, rtol=2e-6, atol=vocab * 2.0**-27)


def test_min_p_is_relative_to_the_best_token():
    probabilities = np.array([[0.5, 0.25, 0.2, 0.05]], np.float32)
    logits = np.log(probabilities)
    for min_p, kept in [(0.0, 4), (0.09, 4), (0.2, 3), (0.45, 2), (0.6, 1), (1.0, 1)]:
        args = logits, logits.max(axis=1), np.ones(1, np.float32), np.array([min_p], np.float32)
        assert (np.asarray(masses(*args, np.full(1, -np.inf))) > 0).sum() == kept


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31), st.sampled_from([1.0, 1e-3, 1e-8]))
def test_inverse_cdf_is_exact(bits, seed, density):
    rng = np.random.default_rng(seed)
    mass = np.where(rng.random(1000) < density, rng.integers(1, 2**20, size=1000), 0).astype(np.int32)
    mass[rng.integers(1000)] = rng.integers(1, 2**29)
    ends = np.cumsum(mass.astype(np.int64))
    expected = np.searchsorted(ends, (bits * int(ends[-1])) >> 32, side="right")
    assert jit_inverse(mass[None], np.array([bits], np.uint32))[0] == expected


def reference_distribution(logits, temperature, top_k, top_p, min_p):
    """vLLM's order with a sort, float64; only for inputs without ties."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    if top_k:
        p[np.argsort(-p)[top_k:]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1), (2.0, 9, 0.9, 0.05)],
)
def test_draws_follow_the_filtered_distribution(temperature, top_k, top_p, min_p):
    draws, vocab = 50_000, 16
    logits = np.random.default_rng(3).normal(size=vocab).astype(np.float32) * 1.5
    column = lambda value, dtype: np.full(draws, value, dtype)  # noqa: E731
    tokens = jit_draw(
        np.tile(logits, (draws, 1)),
        column(logits.max(), np.float32),
        column(temperature, np.float32),
        column(top_k, np.int32),
        column(top_p, np.float32),
        column(min_p, np.float32),
        np.asarray(jax.random.bits(jax.random.key(5), (draws,), jnp.uint32)),
    )
    expected = reference_distribution(logits.astype(np.float64), temperature, top_k, top_p, min_p)
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi_square = (((counts - draws * expected) ** 2)[live] / (draws * expected[live])).sum()
    assert chi_square < 45  # 15 degrees of freedom at most: p < 1e-4, and the bits are fixed


@pytest.mark.parametrize("temperature, top_k, top_p", [(1e-5, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 1e-7), (1e-5, 1, 1e-7)])
@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_extreme_parameters_leave_the_best_token(temperature, top_k, top_p, bits):
    logits = np.random.default_rng(4).normal(size=(1, WIDE)).astype(np.float32)
    one = lambda value, dtype: np.array([value], dtype)  # noqa: E731
    token = jit_draw(
        logits,
        logits.max(axis=1),
        one(temperature, np.float32),
        one(top_k, np.int32),
        one(top_p, np.float32),
        one(0, np.float32),
        one(bits, np.uint32),
    )
    assert token[0] == logits.argmax()


def test_tokens_that_tie_at_the_threshold_are_all_kept():
    logits = np.array([[3.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    assert (logits >= np.asarray(jit_top_k(logits, np.array([2], np.int32)))[:, None]).sum() == 4
    mass = np.array([[50, 20, 20, 10]], np.int32)
    assert (mass >= np.asarray(jit_top_p(mass, np.array([0.6], np.float32)))[:, None]).sum() == 3


def test_best_is_the_first_maximum_and_shows_nan():
    logits = np.array([[1, 5, 5, 2], [-np.inf, -np.inf, 0, 0], [1, np.nan, 2, 3]], np.float32)
    top, token = best(jnp.asarray(logits))
    assert token[:2].tolist() == [1, 2] and top[:2].tolist() == [5, 0] and np.isnan(top[2])
