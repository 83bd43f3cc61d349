"""Each choice of the quantized formats, taken back, in a trained model: text becomes visibly less likely.

The bundled model reads text whose KV went through codes by the reading rule, and with one choice undone at a time. What
the same ablations do to attention alone: tests/kernels/test_packed_ablations.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import bundled
from jaxserve.checkpoint.load import load_model
from jaxserve.eval.tasks.filler import book
from jaxserve.kv.rotation import rotated_keys
from jaxserve.models.model import Model, Params
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import PAGE_TOKENS
from pallas_kernels.layouts import EightBitRows, Fp8, hack
from tests.kernels.packed_cases import Packed
from tests.kernels.test_packed_ablations import StochasticP

TOKENS, WINDOWS = 768, 2


@dataclass(frozen=True)
class Tokens:
    """Codes of single tokens, as the layouts of pages have them."""

    layout: EightBitRows

    def encode(self, k: jax.Array, v: jax.Array) -> tuple[Any, ...]:
        return self.layout.encode(k, v, 0)

    def decode(self, codes: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        keys, values, (k_scale, v_scale) = codes
        k, v = (x.astype(jnp.float32) * s[..., None] for x, s in ((keys, k_scale), (values, v_scale)))
        return k, v


@dataclass(frozen=True)
class Reading:
    """How a query reads: the first `sinks` pages of `size` tokens and the last `residual` up to its own as they are,
    others as codes."""

    layout: Packed | Tokens
    rotated: bool = False
    sinks: int = 1
    residual: int = 1
    size: int = PAGE_TOKENS

    def there_and_back(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """k, v float32 [tokens, kv_heads, head_dim], by way of codes."""
        turn = rotated_keys if self.rotated else lambda x: x  # of 64 channels: its own inverse
        pages = (x.reshape(-1, self.size, *x.shape[1:]).swapaxes(1, 2) for x in (turn(k), v))
        k, v = (x.swapaxes(1, 2).reshape(k.shape) for x in self.layout.decode(self.layout.encode(*pages)))
        return turn(k), v

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> [tokens, heads, head_dim]."""
        q32 = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        k, v = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (k, v))
        k_codes, v_codes = self.there_and_back(k, v)
        position = jnp.arange(q.shape[0])
        page = position // self.size
        plain = (page < self.sinks) | (page > page[:, None] - self.residual)
        s = jnp.where(plain, *(jnp.einsum("qhgd,khd->hgqk", q32, keys) for keys in (k, k_codes))) * scale
        p = jax.nn.softmax(jnp.where(position[:, None] >= position, s, -jnp.inf), axis=-1)
        o = jnp.einsum("hgqk,khd->qhgd", jnp.where(plain, p, 0), v)
        o += jnp.einsum("hgqk,khd->qhgd", jnp.where(plain, 0, p), v_codes)
        return o.reshape(q.shape)


@cache
def trained() -> tuple[Model, Params, jax.Array]:
    """The bundled model, and tokens [windows, tokens] to read."""
    text = Tokenizer.from_folder(bundled.path()).encode(book())[: WINDOWS * TOKENS]
    return *load_model(bundled.path(), "float32"), jnp.asarray(np.array(text, np.int32).reshape(WINDOWS, TOKENS))


@cache
def harm(reading: Reading) -> float:
    """Mean divergence (nats) of what the model expects next from what it expects with its KV as it is."""
    exact = jax.nn.log_softmax(expected(Reading(hack(8), sinks=TOKENS)))
    got = jax.nn.log_softmax(expected(reading))
    return float(jnp.mean(jnp.sum(jnp.exp(exact) * (exact - got), axis=-1)))


@cache
def expected(reading: Reading) -> jax.Array:
    """Logits [windows, tokens, vocabulary]."""
    model, params, text = trained()

    def attend(layer: int, kv: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, jax.Array]:
        return kv, reading.attend(q, k, v, model.attention_spec(layer).scale)

    @jax.jit
    def one(params: Params, tokens: jax.Array) -> jax.Array:
        hidden, _ = model.forward(params, tokens, jnp.arange(TOKENS), None, attend)
        return model.logits(params, hidden)

    return jnp.stack([one(params, window) for window in text])


def test_sealing_every_token_at_once_hurts() -> None:
    """The page of the query read as codes too."""
    assert harm(Reading(hack(4), residual=0)) > 2.5 * harm(Reading(hack(4)))


def test_swapped_axes_hurt() -> None:
    """Form P: keys per token, values per channel."""
    assert harm(Reading(hack(2, "P"))) > 1.3 * harm(Reading(hack(2)))


def test_stochastic_rounding_hurts() -> None:
    """In form P, as its paper has it."""
    assert harm(Reading(StochasticP(4))) > 1.5 * harm(Reading(hack(4, "P")))


def test_keys_lose_less_when_they_are_rotated() -> None:
    assert harm(Reading(hack(4), rotated=True)) < 0.75 * harm(Reading(hack(4)))


@dataclass(frozen=True)
class Smallest(Fp8):
    """Each vector with the smallest scale that holds it."""

    def encode(self, x: jax.Array, scales: jax.Array | None = None, *, along: int = 0) -> tuple[jax.Array, ...]:
        return super().encode(x, jnp.max(jnp.abs(x), axis=-1) / self.peak)


def test_the_smallest_scales_of_fp8_hurt() -> None:
    fp8, smallest = (Reading(Tokens(EightBitRows(code)), sinks=0, residual=0) for code in (Fp8(), Smallest()))
    assert harm(smallest) > 1.8 * harm(fp8)
    assert harm(replace(fp8, rotated=True)) < 0.95 * harm(fp8)


def test_wider_partitions_hurt() -> None:
    """As many tokens in 16 bits, others in pages of 32 and of 128."""
    narrow = Reading(hack(2), rotated=True, size=32, sinks=4, residual=4)
    assert harm(Reading(hack(2), rotated=True, size=128)) > 1.4 * harm(narrow)


def test_eight_bits_are_nothing_beside_four() -> None:
    assert harm(Reading(hack(8))) < harm(Reading(hack(4))) / 50
