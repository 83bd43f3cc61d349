"""Random bits of a sequence: a function of its seed, its choice and the position, never of the batch.

key = fold_in(fold_in(fold_in(key(seed), choice), position), purpose), with jax's threefry.
"""

from __future__ import annotations

from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Purpose(IntEnum):
    """What a draw at a position is for. The numbers are part of what a seed means: never renumber.

    SAMPLE draws a token, also when it verifies a deterministic draft (see speculative/verify.py). ACCEPT and RESIDUAL
    belong to verifying drafts that were drawn from a distribution themselves.
    """

    SAMPLE = 0
    ACCEPT = 1
    RESIDUAL = 2


def seed_words(seed: int) -> np.ndarray:
    """uint32 [2]: the key data of `jax.random.key(seed)` for a seed of up to 64 bits (taken modulo 2^64)."""
    return np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def choice_key(words: Array, choice: Array) -> Array:
    """uint32 [2]: key data of fold_in(key(seed), choice)."""
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), choice))


def random_bits(words: Array, positions: Array, purpose: Purpose) -> Array:
    """uint32 [N]: 32 random bits for each row. words: uint32 [N, 2] from `choice_key`; positions: int32 [N]."""

    def one(word: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(word, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, position), int(purpose)), (), jnp.uint32)

    return jax.vmap(one)(words, positions)
