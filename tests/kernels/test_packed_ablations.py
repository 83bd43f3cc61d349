"""Each choice of the packed formats, taken back: attention over 2-bit pages must visibly suffer.

The problem is synthetic: keys with outlier channels, as trained models have them, values without, and queries that look
for one token each. Error: of attention's output against the same in float64 on what was quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layouts import HackPartitioned, hack
from pallas_kernels.layouts.packing import quantize
from tests.kernels.packed_cases import Packed, outliers

PAGES, TOKENS, DIM = 8, 64, 64


@dataclass(frozen=True)
class Problem:
    """k, v [pages, tokens, channels]; q [queries, channels]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def attend(self, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        s = self.q @ k.reshape(-1, DIM).T / np.sqrt(DIM)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True) @ v.reshape(-1, DIM)

    def error(self, k: np.ndarray, v: np.ndarray) -> float:
        exact = self.attend(self.k, self.v)
        return float(np.linalg.norm(self.attend(k, v) - exact) / np.linalg.norm(exact))


def even(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def problem(wanted: slice, keys: Callable[..., np.ndarray] = outliers) -> Problem:
    """Each query looks for one of the `wanted` tokens, by all but the outlier channels."""
    k, v = keys((PAGES, TOKENS, DIM), 0), even((PAGES, TOKENS, DIM), 1)
    k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (k, v))
    q = k.reshape(-1, DIM)[wanted].copy()
    q[:, 3::16] = 0.1
    return Problem(0.8 * q, k, v)


def sealed(layout: Packed, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the codes of k, v [pages, tokens, channels] stand for."""

    def there_and_back(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return layout.decode(layout.encode(k, v))

    decoded = jax.jit(there_and_back)(*(jnp.asarray(x, jnp.bfloat16)[:, None] for x in (k, v)))
    return tuple(np.asarray(x[:, 0], np.float64) for x in decoded)  # type: ignore[return-value]


class StochasticP(HackPartitioned):
    """Form P as the paper rounds: up with a probability of the fraction."""

    def _quantize(self, x, axis):
        _, to = super()._quantize(x, axis)
        scale, minimum = (self._spread(meta.astype(jnp.float32), axis) for meta in to)
        noise = jax.random.uniform(jax.random.key(x.shape[-1]), x.shape) - 0.5
        return quantize(x + noise * scale, type(to)(scale, minimum), self.bits), to


@pytest.fixture(scope="module")
def anywhere() -> Problem:
    return problem(slice(None, None, 4))


def test_swapped_axes_hurt(anywhere: Problem) -> None:
    """Keys per token: an outlier channel takes the range of all channels of its token."""
    right = anywhere.error(*sealed(hack(2, "F"), anywhere.k, anywhere.v))
    swapped = anywhere.error(*sealed(hack(2, "P"), anywhere.k, anywhere.v))
    assert swapped > 1.5 * right


def test_stochastic_rounding_hurts() -> None:
    """On keys without outliers, which form P can hold."""
    plain = problem(slice(None, None, 4), even)
    nearest = plain.error(*sealed(hack(2, "P"), plain.k, plain.v))
    stochastic = plain.error(*sealed(StochasticP(2), plain.k, plain.v))
    assert stochastic > 1.15 * nearest


def test_no_residual_hurts() -> None:
    """Queries that look at the newest page: in 16 bits, or sealed like the others."""
    late = problem(slice(-TOKENS, None))
    k, v = sealed(hack(2), late.k, late.v)
    with_residual = [np.concatenate([codes[:-1], exact[-1:]]) for codes, exact in ((k, late.k), (v, late.v))]
    assert late.error(k, v) > 3 * late.error(*with_residual)


def test_quantizing_again_hurts() -> None:
    """A page that is quantized again whenever a token joins it, instead of once when it is full: codes drift."""
    layout = hack(4)
    given = jnp.asarray(outliers((TOKENS, DIM), 0), jnp.bfloat16)
    place = jnp.arange(TOKENS)[:, None]

    def there_and_back(k: jax.Array) -> jax.Array:
        page = k.astype(jnp.bfloat16)[None, None]
        return layout.decode(layout.encode(page, page))[0][0, 0]

    def join(page: jax.Array, token: jax.Array) -> tuple[jax.Array, None]:
        # What has not come yet repeats the newest token, which leaves the range as it is.
        return there_and_back(jnp.where(place < token, page, given[token].astype(jnp.float32))), None

    once = jax.jit(there_and_back)(given)
    drifted = jax.jit(lambda: jax.lax.scan(join, jnp.zeros((TOKENS, DIM)), jnp.arange(TOKENS))[0])()
    assert jnp.mean(jnp.abs(drifted - given)) > 1.2 * jnp.mean(jnp.abs(once - given))


def test_more_bits_help(anywhere: Problem) -> None:
    errors = [anywhere.error(*sealed(hack(bits), anywhere.k, anywhere.v)) for bits in (2, 4, 8)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
