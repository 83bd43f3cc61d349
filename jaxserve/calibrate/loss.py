"""What leaving out channels costs: the mean loss of a text, read as a KV cache with sealed pages reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint.kv_calibration import Channels
from jaxserve.models.config import AttentionSpec
from jaxserve.models.model import Model, Params
from jaxserve.types import PAGE_TOKENS

Cut = Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""cut(layer, q, k, v), float32 [T, heads or kv_heads, head_dim]: keys and values as sealed pages hold them."""


class Loss:
    """Of a model in its basis, over windows of equal length.

    A query reads the keys of its own page and of the first whole, as serving does with one residual and one sink page,
    and of all others the leading channels. How many is data: one program serves all choices.
    """

    def __init__(self, model: Model, params: Params, windows: np.ndarray):
        """`windows`: int32 [count, tokens]."""
        self._model, self._params, self._windows = model, params, windows
        self._one = jax.jit(self._window)
        self._known: dict[Channels, float] = {}

    def __call__(self, channels: Channels) -> float:
        """Nats a token. No choice is measured twice."""
        if channels not in self._known:
            self._known[channels] = self._measure(channels)
        return self._known[channels]

    def _measure(self, channels: Channels) -> float:
        kept = np.asarray(channels)[..., None] > np.arange(self._model.config.head_dim)
        masks = jnp.asarray(kept, jnp.float32)
        return float(np.mean([self._one(self._params, masks, window) for window in self._windows], dtype=np.float64))

    def _window(self, params: Params, masks: jax.Array, tokens: jax.Array) -> jax.Array:
        """`masks` float32 [layers, 2, head_dim]."""

        def cut(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return k * masks[layer, 0], v * masks[layer, 1]

        return window_loss(self._model, params, tokens, cut)


def window_loss(model: Model, params: Params, tokens: jax.Array, cut: Cut) -> jax.Array:
    """Nats a token of one window, where what is read sealed is what `cut` leaves of keys and values."""

    def attend(layer: int, kv: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
        q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
        o = _attend(q32, (k32, v32), cut(layer, q32, k32, v32), model.attention_spec(layer))
        return kv, o.astype(q.dtype)

    hidden, _ = model.forward(params, tokens, jnp.arange(len(tokens)), None, attend)
    logprobs = jax.nn.log_softmax(model.logits(params, hidden[:-1]))
    return -jnp.mean(jnp.take_along_axis(logprobs, tokens[1:, None], axis=1))


def _attend(
    q: jax.Array, whole: tuple[jax.Array, jax.Array], sealed: tuple[jax.Array, jax.Array], spec: AttentionSpec
) -> jax.Array:
    """q [T, heads, head_dim], keys and values [T, kv_heads, head_dim] of whole and of sealed pages -> like q."""
    tokens, heads, head_dim = q.shape
    (k32, v32), (sealed_k, sealed_v) = whole, sealed
    q32 = q.reshape(tokens, k32.shape[1], -1, head_dim)
    position = jnp.arange(tokens)
    exact = whole_pages(tokens)
    age = position[:, None] - position
    seen = (age >= 0) if spec.window is None else (age >= 0) & (age < spec.window)

    def scores(keys: jax.Array) -> jax.Array:
        s = jnp.einsum("qhgd,khd->hgqk", q32, keys, precision="highest") * spec.scale
        return s if spec.softcap is None else spec.softcap * jnp.tanh(s / spec.softcap)

    s = jnp.where(exact, scores(k32), scores(sealed_k))
    p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)

    def mixed(weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("hgqk,khd->qhgd", weights, values, precision="highest")

    o = mixed(jnp.where(exact, p, 0), v32) + mixed(jnp.where(exact, 0, p), sealed_v)
    return o.reshape(tokens, heads, head_dim)


def whole_pages(tokens: int) -> jax.Array:
    """bool [tokens, tokens], query by key: whether the key's page is read whole, as the first and the query's own."""
    page = jnp.arange(tokens) // PAGE_TOKENS
    return (page == page[:, None]) | (page == 0)


def rise(loss: float, base: float) -> float:
    """Of perplexity, in percent."""
    return 100 * math.expm1(loss - base)


def full(layers: int, head_dim: int) -> Channels:
    return ((head_dim, head_dim),) * layers
