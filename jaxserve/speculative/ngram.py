"""Prompt look-up: what followed the last tokens when they occurred before (Saxena 2023, vLLM's `ngram` method)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxserve.sampling.state import Ints, Slots


@dataclass(frozen=True)
class NGram:
    """Finds the longest of the last `max_n` to `min_n` tokens earlier in the history, its most recent occurrence, and
    proposes what came next. Where the occurrence overlaps the end, the period repeats (as in an LZ77 copy)."""

    max_n: int = 4
    min_n: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.min_n <= self.max_n:
            raise ValueError(f"n-gram look-up needs 1 <= min_n <= max_n, got min_n={self.min_n}, max_n={self.max_n}.")

    def propose(self, slots: Slots, ids: Array) -> tuple[Array, Array]:
        width, size = slots.drafts.shape[1], slots.tokens.shape[1]
        history = slots.tokens.at[ids].get(mode="fill", fill_value=-1)
        length = slots.ints.at[ids, Ints.LENGTH].get(mode="fill", fill_value=0)[:, None]
        end = jnp.arange(size, dtype=jnp.int32)[None, :]  # where an earlier occurrence ends

        run = jnp.zeros(history.shape, jnp.int32)
        alive = end < length - 1
        for i in range(self.max_n):
            wanted = jnp.take_along_axis(history, jnp.maximum(length - 1 - i, 0), axis=1)
            alive &= (jnp.pad(history, ((0, 0), (i, 0)), constant_values=-1)[:, :size] == wanted) & (end >= i)
            run += alive
        score = jnp.max(jnp.where(run >= self.min_n, run * size + end, -1), axis=1, keepdims=True)

        start = score % size + 1
        period = jnp.maximum(length - start, 1)
        index = start + jnp.arange(width, dtype=jnp.int32)[None, :] % period
        drafts = jnp.take_along_axis(history, jnp.clip(index, 0, size - 1), axis=1)
        return drafts, jnp.where(score[:, 0] >= 0, width, 0)
