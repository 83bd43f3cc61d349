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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import bundled
from jaxserve.calibrate.choice import path
from jaxserve.calibrate.loss import rise, whole_pages, window_loss
from jaxserve.calibrate.moments import collect
from jaxserve.calibrate.options import CalibrateOptions
from jaxserve.calibrate.rotations import find_basis
from jaxserve.calibrate.run import sample, split
from jaxserve.checkpoint.kv_calibration import Channels, share
from jaxserve.checkpoint.load import load_model
from jaxserve.models.basis import change_basis
from jaxserve.models.model import Model, Params
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import PAGE_TOKENS

TOKENS = ((28, 16, 16), (36, 32, 8), (40, 32, 16))
"""Channels of every token, and those of most tokens beside so many tokens a page with all: the same bytes in heads of
64 channels."""


class Rise:
    """Of held-out perplexity in percent, with channels by head and side, and with `tokens` of each page whole."""

    def __init__(self, model: Model, params: Params, held_out: np.ndarray) -> None:
        self.model, self._params, self._held_out = model, params, held_out
        self._programs = {oracle: jax.jit(partial(self._window, oracle)) for oracle in (False, True)}
        c = model.config
        self._base = self.loss(np.full((c.layers, c.kv_heads, 2), c.head_dim))

    def __call__(self, channels: np.ndarray, tokens: tuple[int, int] = (0, 0), oracle: bool = False) -> float:
        """`channels`: int [layers, kv_heads, 2]; `tokens`: of keys and of values."""
        return rise(self.loss(channels, tokens, oracle), self._base)

    def loss(self, channels: np.ndarray, tokens: tuple[int, int] = (0, 0), oracle: bool = False) -> float:
        """Nats a token."""
        program = self._programs[oracle]
        whole = jnp.asarray(tokens)
        losses = [program(self._params, jnp.asarray(channels), whole, window) for window in self._held_out]
        return float(np.mean(losses, dtype=np.float64))

    def _window(self, oracle: bool, params: Params, channels: jax.Array, whole: jax.Array, tokens: Any) -> jax.Array:
        def cut(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            worth = attention_to_come(q, k, self.model.attention_spec(layer).scale) if oracle else 1.0

            def side(x: jax.Array, number: int) -> jax.Array:
                leading = jnp.arange(x.shape[-1]) < channels[layer, :, number, None]
                lost = jnp.linalg.norm(jnp.where(leading, 0, x), axis=-1) * worth
                order = jnp.argsort(-lost.reshape(-1, PAGE_TOKENS, lost.shape[1]), axis=1)
                kept = (jnp.argsort(order, axis=1) < whole[number]).reshape(lost.shape)
                return jnp.where(leading | kept[..., None], x, 0)

            return side(k, 0), side(v, 1)

        return window_loss(self.model, params, tokens, cut)


def attention_to_come(q: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    """[T, kv_heads]: what each token is given by queries that read it sealed."""
    length, kv_heads, head_dim = k.shape
    scores = jnp.einsum("qhgd,khd->hgqk", q.reshape(length, kv_heads, -1, head_dim), k, precision="highest") * scale
    attention = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf), axis=-1)
    return jnp.sum(jnp.where(whole_pages(length), 0, attention), axis=(1, 2)).T


def by_head(risen: Rise, quick: Rise, sizes: tuple[int, ...]) -> None:
    c = risen.model.config

    def spread(choice: Channels) -> np.ndarray:
        """One pair a layer or one a head -> [layers, kv_heads, 2]"""
        pairs = np.asarray(choice).reshape(c.layers, -1, 2)
        return np.broadcast_to(pairs, (c.layers, c.kv_heads, 2))

    paths = [
        path(units, c.head_dim, sizes, lambda choice: quick.loss(spread(choice)))
        for units in (c.layers, c.layers * c.kv_heads)
    ]
    print("| channels kept | a number for each layer | for each head |\n|---:|---:|---:|")
    for least in (0.75, 0.625, 0.5, 0.4):
        rises = []
        for choices in paths:
            choice = next(choice for choice in choices if share(choice, c.head_dim) <= least)
            rises.append(f"{risen(spread(choice)):+.2f} %")
        print(f"| {least:.1%} | {' | '.join(rises)} |", flush=True)


def by_token(risen: Rise) -> None:
    c = risen.model.config
    print("\n| side | kept | channels of every token | tokens by what they lose | with the attention to come |")
    print("|---|---:|---:|---:|---:|")
    for side, name in enumerate(("keys", "values")):
        for alike, fewer, tokens in TOKENS:
            channels, some = (np.full((c.layers, c.kv_heads, 2), c.head_dim) for _ in range(2))
            channels[..., side], some[..., side] = alike, fewer
            whole = (tokens, 0) if side == 0 else (0, tokens)
            rises = [risen(channels), risen(some, whole), risen(some, whole, True)]
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
    risen = Rise(*turned, held_out)
    by_head(risen, Rise(*turned, held_out[:2]), tuple(options.sizes(c.head_dim)))
    by_token(risen)


if __name__ == "__main__":
    main()
