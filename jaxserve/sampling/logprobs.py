"""Log-probabilities of the raw logits: of given tokens with their ranks, and the best alternatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.sampling.state import Slots
from jaxserve.types import PAGE_TOKENS

MAX_LOGPROBS = 20

LogitsFn = Callable[[Array], Array]
"""hidden [n, d] -> logits float32 [n, vocab]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """One array, so that the host waits for one transfer; read the properties after `jax.device_get`.

    packed: int32 [..., 2 + 2 * top]: rank, log-probability, `top` ids, `top` log-probabilities (floats bit-cast), where
    top = min(20, vocab). Rank 1 is the most probable token; tokens that tie share the better rank.
    """

    packed: Array

    @property
    def _top(self) -> int:
        return self.packed.shape[-1] // 2 - 1

    @property
    def rank(self) -> np.ndarray:
        return np.asarray(self.packed)[..., 0]

    @property
    def logprob(self) -> np.ndarray:
        return np.asarray(self.packed)[..., 1].copy().view(np.float32)

    @property
    def top_ids(self) -> np.ndarray:
        return np.asarray(self.packed)[..., 2 : 2 + self._top]

    @property
    def top_logprobs(self) -> np.ndarray:
        return np.asarray(self.packed)[..., 2 + self._top :].copy().view(np.float32)


def packed_width(vocab: int) -> int:
    """Last dimension of `Logprobs.packed`."""
    return 2 + 2 * min(MAX_LOGPROBS, vocab)


def logprobs_of(logits: Array, tokens: Array) -> Logprobs:
    """logits: float32 [N, V]; tokens: int32 [N] -> packed [N, ...]."""
    norm = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    rank = 1 + jnp.sum(logits > own, axis=1, keepdims=True, dtype=jnp.int32)
    values, ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)  # noqa: E731
    return Logprobs(jnp.concatenate([rank, bits(own - norm), ids.astype(jnp.int32), bits(values - norm)], axis=1))


def prompt_logprobs(
    logits_fn: LogitsFn, slots: Slots, slot: Array, start: Array, hidden_base: Array, tokens: int = PAGE_TOKENS
) -> Logprobs:
    """Log-probabilities of what follows the `tokens` tokens of a prefill tile, packed [tokens, ...].

    Row i belongs to position start + i, whose activations are `slots.hidden[hidden_base + i]`; its target is the known
    token at start + i + 1. Rows past the tile's tokens, and the row of the last known token, hold nothing meaningful:
    the caller knows which.
    """
    hidden = jax.lax.dynamic_slice_in_dim(slots.hidden, hidden_base, tokens, axis=0)
    positions = start + 1 + jnp.arange(tokens, dtype=jnp.int32)
    targets = slots.tokens.at[slot, positions].get(mode="fill", fill_value=0)
    return logprobs_of(logits_fn(hidden), targets)
