"""What finer choices of ZeroC's channels would save: by KV head, or token by token within a page.

    python benchmarks/zeroc_finer.py                     # some eight minutes on two cores, the bundled model
    python benchmarks/zeroc_finer.py --held-out 2048      # a quick look

`jaxserve calibrate` chooses channels by layer, for all heads and tokens of its sealed pages alike. Two tables say what
else could be had for the same bytes, as the rise of held-out perplexity: the path of choices with a number for each
head, beside the path with one for each layer; and pages in which some tokens keep all channels, taken from those that
all others keep. Who these tokens are is either what sealing knows (whose left-out channels are largest) or what no
cache can know (whom later queries will attend to, times that): the second bounds what any choice of tokens could gain.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import bundled
from jaxserve.calibrate.choice import path
from jaxserve.calibrate.moments import collect
from jaxserve.calibrate.options import CalibrateOptions
from jaxserve.calibrate.rotations import find_basis
from jaxserve.calibrate.run import sample, split
from jaxserve.checkpoint.kv_calibration import Channels, share
from jaxserve.checkpoint.load import load_model
from jaxserve.models.basis import change_basis
from jaxserve.models.config import AttentionSpec
from jaxserve.models.model import Model, Params
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import PAGE_TOKENS

TOKENS = ((28, 16, 16), (36, 32, 8), (40, 32, 16))
"""Channels of every token, and those of most tokens beside so many tokens a page with all: the same bytes in heads of
64 channels."""


class Loss:
    """As `calibrate.loss.Loss`, with channels by head and side, and with `tokens` of each page whole."""

    def __init__(self, model: Model, params: Params, held_out: np.ndarray) -> None:
        self.model, self.params, self.held_out = model, params, held_out
        self._programs = {oracle: jax.jit(partial(self._window, oracle)) for oracle in (False, True)}

    def __call__(self, channels: np.ndarray, tokens: tuple[int, int] = (0, 0), oracle: bool = False) -> float:
        """Nats a token. `channels`: int [layers, kv_heads, 2]; `tokens`: of keys and of values."""
        program = self._programs[oracle]
        whole = jnp.asarray(tokens)
        losses = [program(self.params, jnp.asarray(channels), whole, window) for window in self.held_out]
        return float(np.mean(losses, dtype=np.float64))

    def rise(self, *args: Any) -> float:
        """Of perplexity, in percent, over that with all channels."""
        c = self.model.config
        everything = np.full((c.layers, c.kv_heads, 2), c.head_dim)
        return 100 * math.expm1(self(*args) - self(everything))

    def _window(self, oracle: bool, params: Params, channels: jax.Array, whole: jax.Array, tokens: Any) -> jax.Array:
        def attend(layer: int, kv: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
            return kv, _attend(q, k, v, channels[layer], whole, self.model.attention_spec(layer), oracle)

        hidden, _ = self.model.forward(params, tokens, jnp.arange(len(tokens)), None, attend)
        logprobs = jax.nn.log_softmax(self.model.logits(params, hidden[:-1]))
        return -jnp.mean(jnp.take_along_axis(logprobs, tokens[1:, None], axis=1))


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, channels: jax.Array, whole: jax.Array, spec: AttentionSpec, oracle: bool
) -> jax.Array:
    """q [T, heads, head_dim], k and v [T, kv_heads, head_dim], channels [kv_heads, 2], whole [2] -> like q."""
    length, _, head_dim = q.shape
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    q32 = q32.reshape(length, k.shape[1], -1, head_dim)
    position = jnp.arange(length)
    page = position // PAGE_TOKENS
    exact = (page == page[:, None]) | (page == 0)
    seen = position[:, None] >= position

    def scores(keys: jax.Array) -> jax.Array:
        return jnp.einsum("qhgd,khd->hgqk", q32, keys, precision="highest") * spec.scale

    def mixed(weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("hgqk,khd->qhgd", weights, values, precision="highest")

    attention = jax.nn.softmax(jnp.where(seen, scores(k32), -jnp.inf), axis=-1)
    worth = jnp.sum(jnp.where(exact, 0, attention), axis=(1, 2)).T if oracle else 1.0

    def cut(x: jax.Array, side: int) -> jax.Array:
        leading = jnp.arange(head_dim) < channels[:, side, None]
        lost = jnp.linalg.norm(jnp.where(leading, 0, x), axis=-1) * worth
        order = jnp.argsort(-lost.reshape(-1, PAGE_TOKENS, lost.shape[1]), axis=1)
        kept = (jnp.argsort(order, axis=1) < whole[side]).reshape(lost.shape)
        return jnp.where(leading | kept[..., None], x, 0)

    s = jnp.where(exact, scores(k32), scores(cut(k32, 0)))
    p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)
    o = mixed(jnp.where(exact, p, 0), v32) + mixed(jnp.where(exact, 0, p), cut(v32, 1))
    return o.reshape(q.shape).astype(q.dtype)


def by_head(loss: Loss, quick: Loss, sizes: tuple[int, ...]) -> None:
    c = loss.model.config

    def spread(choice: Channels) -> np.ndarray:
        """One pair a layer or one a head -> [layers, kv_heads, 2]"""
        pairs = np.asarray(choice).reshape(c.layers, -1, 2)
        return np.broadcast_to(pairs, (c.layers, c.kv_heads, 2))

    paths = [
        path(units, c.head_dim, sizes, lambda choice: quick(spread(choice)))
        for units in (c.layers, c.layers * c.kv_heads)
    ]
    print("| channels kept | a number for each layer | for each head |\n|---:|---:|---:|")
    for least in (0.75, 0.625, 0.5, 0.4):
        rises = []
        for choices in paths:
            choice = next(choice for choice in choices if share(choice, c.head_dim) <= least)
            rises.append(f"{loss.rise(spread(choice)):+.2f} %")
        print(f"| {least:.1%} | {' | '.join(rises)} |", flush=True)


def by_token(loss: Loss) -> None:
    c = loss.model.config
    print("\n| side | kept | channels of every token | tokens by what they lose | with the attention to come |")
    print("|---|---:|---:|---:|---:|")
    for side, name in enumerate(("keys", "values")):
        for alike, fewer, tokens in TOKENS:
            channels, some = (np.full((c.layers, c.kv_heads, 2), c.head_dim) for _ in range(2))
            channels[..., side], some[..., side] = alike, fewer
            whole = (tokens, 0) if side == 0 else (0, tokens)
            rises = [loss.rise(channels), loss.rise(some, whole), loss.rise(some, whole, True)]
            about = [f"{alike}: ", f"{fewer}, {tokens} tokens whole: ", ""]
            cells = " | ".join(f"{words}{rise:+.2f} %" for words, rise in zip(about, rises, strict=True))
            print(f"| {name} | {alike / c.head_dim:.1%} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=int, default=8192, help="tokens to measure on (default 8192)")
    args = parser.parse_args()
    folder = bundled.path()
    model, params = load_model(folder, "float32")
    c = model.config
    options = CalibrateOptions(held_out=args.held_out)
    text, held_out = split(Tokenizer.from_folder(folder).encode(sample()), options, c.max_position)
    turned = change_basis(model, params, find_basis(collect(model, params, text), model, params))
    loss = Loss(*turned, held_out)
    by_head(loss, Loss(*turned, held_out[:2]), tuple(options.sizes(c.head_dim)))
    by_token(loss)


if __name__ == "__main__":
    main()
