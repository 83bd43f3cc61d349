"""The rotation of keys and queries: what it keeps, and that its bits do not depend on a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kv.rotation import rotated_keys, rotated_queries


@pytest.mark.parametrize("channels", [32, 64, 128])
def test_products_stay_and_outliers_spread(channels: int) -> None:
    rng = np.random.default_rng(channels)
    q, k = rng.standard_normal((2, 50, channels)).astype(np.float32)
    k[:, 3] += 40
    exact = q.astype(np.float64) @ k.T.astype(np.float64)
    turned = np.asarray(rotated_keys(jnp.asarray(k)), np.float64)
    got = np.asarray(rotated_queries(jnp.asarray(q)), np.float64) @ turned.T
    # Entries are rounded by half a unit, a 2^24 / channels-th of the largest of their vector; errors add up at random.
    size = np.abs(q).max() * np.linalg.norm(k, axis=1).max() + np.abs(k).max() * np.linalg.norm(q, axis=1).max()
    assert np.abs(got - exact).max() < 2 * size * channels / 2**24
    assert np.abs(turned).max() < 40 / 2


def test_a_vector_has_the_same_bits_alone_and_in_a_crowd() -> None:
    x = jax.random.normal(jax.random.key(0), (37, 5, 64))
    crowd = jax.jit(rotated_keys)(x)
    np.testing.assert_array_equal(jax.jit(rotated_keys)(x[4, 2]), crowd[4, 2])
    np.testing.assert_array_equal(jax.jit(lambda y: rotated_keys(y * 2))(x[3:6]), 2 * crowd[3:6])


def test_nothing_stays_nothing() -> None:
    assert not jnp.any(rotated_keys(jnp.zeros((3, 64))))
