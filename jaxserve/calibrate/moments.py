"""What a model's queries, keys and values look like over a text: their second moments, head by head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.dense_attention import dense_attend
from jaxserve.models.model import Model, Params


@dataclass(frozen=True)
class Moments:
    """Sums of x^T x over tokens, float64 [layers, kv_heads, head_dim, head_dim]: of queries (all of a KV head's group)
    and keys after RoPE, and of values."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray


def collect(
    model: Model, params: Params, windows: Iterable[np.ndarray], done: Callable[[], object] = lambda: None
) -> Moments:
    """Moments over `windows` of tokens, each a text of its own. `done` is called after each."""
    c = model.config
    plain = dense_attend(model)

    def square(x: jax.Array) -> jax.Array:
        """x [T, heads, head_dim], the heads of a group side by side -> [kv_heads, head_dim, head_dim]"""
        x = x.astype(jnp.float32).reshape(x.shape[0], c.kv_heads, -1, c.head_dim)
        return jnp.einsum("thgd,thge->hde", x, x, precision="highest")

    @jax.jit
    def one(params: Params, tokens: jax.Array) -> list[tuple[jax.Array, ...]]:
        found: dict[int, tuple[jax.Array, ...]] = {}

        def attend(layer: int, kv: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
            found[layer] = (square(q), square(k), square(v))
            return plain(layer, kv, q, k, v)

        model.forward(params, tokens, jnp.arange(len(tokens)), None, attend)
        return [found[layer] for layer in range(c.layers)]

    shape = (3, c.layers, c.kv_heads, c.head_dim, c.head_dim)
    total = np.zeros(shape)
    for window in windows:
        total += np.stack([np.stack(layer) for layer in one(params, jnp.asarray(window))], axis=1)
        done()
    return Moments(*total)
