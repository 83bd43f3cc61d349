"""Where top-k and top-p cut a row, without sorting the vocabulary. Pure arrays, one row a token.

Both look among the row's 64 largest entries first, found through block maxima, and bisect over all integer values where
those do not decide. The two ways find the same threshold, so it does not depend on what other rows need.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

MASS_BITS = 30
"""A row's masses sum to less than 2^30: see `draw.masses`."""

CANDIDATES = 64
BLOCK = 64
"""64 candidates from blocks of 64 cost half of one `lax.top_k` and an eighth of a bisection on CPU (16 x 49,152)."""

_CANDIDATE_MASS_BITS = MASS_BITS - CANDIDATES.bit_length() + 1
"""64 tokens share less than 2^30, so the least of them has less than 2^24."""


def largest(x: Array, count: int) -> Array:
    """float32 [N, min(count, V)]: the largest entries of each row of `x` float32 [N, V], in falling order.

    They all lie in the `count` blocks with the largest maxima: an entry above the last of those maxima is among fewer
    than `count` such entries, so its block is one of them; entries equal to it are interchangeable.
    """
    rows, size = x.shape
    blocks = -(-size // BLOCK)
    if blocks <= count:
        return jax.lax.top_k(x, min(count, size))[0]
    x = jnp.pad(x, ((0, 0), (0, blocks * BLOCK - size)), constant_values=-jnp.inf).reshape(rows, blocks, BLOCK)
    chosen = jax.lax.top_k(jnp.max(x, axis=2), count)[1]
    return jax.lax.top_k(jnp.take_along_axis(x, chosen[:, :, None], axis=1).reshape(rows, -1), count)[0]


def largest_true(predicate: Callable[[Array], Array], low: Array, high: Array, steps: int) -> Array:
    """The largest int32 t in [low, high] with predicate(t), for a predicate that holds at `low` and turns false once.

    All rows at once; `steps` is at least log2(high - low + 1), and static so that a GPU need not ask the host.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # average rounded up, without overflow
        holds = predicate(middle)
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

    return jax.lax.fori_loop(0, steps, halve, (low, high))[0]


def top_k_threshold(logits: Array, top_k: Array) -> Array:
    """float32 [N]: the k-th largest logit of each row; -inf where `top_k` int32 [N] is 0 or not below V."""
    rows, vocab = logits.shape
    limited = (top_k > 0) & (top_k < vocab)

    def nothing() -> Array:
        return jnp.full((rows,), -jnp.inf, jnp.float32)

    def among_candidates() -> Array:
        values = largest(logits, CANDIDATES)
        index = jnp.clip(top_k - 1, 0, values.shape[1] - 1)
        return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]

    def bisection() -> Array:
        keys = _ordered(logits)
        ends = jnp.iinfo(jnp.int32)
        low, high = jnp.full((rows,), ends.min, jnp.int32), jnp.full((rows,), ends.max, jnp.int32)
        key = largest_true(lambda t: jnp.sum(keys >= t[:, None], axis=1, dtype=jnp.int32) >= top_k, low, high, steps=32)
        return _from_ordered(key)

    way = jnp.where(jnp.any(limited & (top_k > CANDIDATES)), 2, jnp.any(limited).astype(jnp.int32))
    return jnp.where(limited, jax.lax.switch(way, (nothing, among_candidates, bisection)), -jnp.inf)


def top_p_threshold(mass: Array, top_p: Array) -> Array:
    """int32 [N]: the largest mass t such that tokens of at least t hold `top_p` of the row's mass; 1 for top_p 1.

    mass: int32 [N, V] from `draw.masses`.
    """
    rows = mass.shape[0]
    limited = top_p < 1.0

    def nothing() -> Array:
        return jnp.ones((rows,), jnp.int32)

    def search() -> Array:
        total = jnp.sum(mass, axis=1, dtype=jnp.int32)
        need = jnp.clip(jnp.ceil(top_p * total.astype(jnp.float32)).astype(jnp.int32), 1, total)
        # As float32 bits, lifted over the denormals that XLA flushes, masses compare as they do as integers.
        lift = jnp.int32(1 << 23)
        values = largest(jax.lax.bitcast_convert_type(mass + lift, jnp.float32), CANDIDATES)
        values = jax.lax.bitcast_convert_type(values, jnp.int32) - lift
        below = jnp.sum(jnp.cumsum(values, axis=1) < need[:, None], axis=1, dtype=jnp.int32)
        last = values.shape[1] - 1
        found = ~limited | (below <= last)
        threshold = jnp.take_along_axis(values, jnp.minimum(below, last)[:, None], axis=1)[:, 0]

        def bisection() -> Array:
            def enough(t: Array) -> Array:
                return jnp.sum(jnp.where(mass >= t[:, None], mass, 0), axis=1, dtype=jnp.int32) >= need

            low = jnp.where(found, threshold, 1)
            return largest_true(enough, low, threshold, steps=_CANDIDATE_MASS_BITS)

        return jax.lax.cond(jnp.all(found), lambda: threshold, bisection)

    return jnp.where(limited, jax.lax.cond(jnp.any(limited), search, nothing), 1)


def _ordered(x: Array) -> Array:
    """int32 keys that compare as the float32 `x` does (no NaN); both zeros are one key."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered(key: Array) -> Array:
    return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)
