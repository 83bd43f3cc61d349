"""What the FULL head does to logits before a token is drawn: masks, bias, penalties. Pure arrays.

Order as in vLLM: grammar, allowed tokens, banned sequences, min_tokens, bias, penalties. Position j of a row sees the
drafts 0..j-1 as if they had been generated: it counts only if they are accepted.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.sampling.state import (
    BANNED_TOKENS,
    IN_PROMPT,
    MAX_BANNED,
    WORD_BITS,
    Features,
    Floats,
    Ints,
    Slots,
    extras_offsets,
)


def process(logits: Array, slots: Slots, ids: Array, ints: Array, floats: Array, drafts: Array, masks: Array) -> Array:
    """float32 [R, q, V] -> the same, with forbidden tokens at -inf. Rows that use a feature do not change the others.

    ids: int32 [R] slots (out of range: padding); ints, floats: their rows; drafts: int32 [R, q - 1]; masks: uint32
    [R, ceil(V / 32)] of tokens that a grammar allows.
    """
    rows, width, vocab = logits.shape
    extras = _split(slots.extras.at[ids].get(mode="fill", fill_value=0), vocab)
    has = lambda feature: (ints[:, Ints.FEATURES] & int(feature)) != 0  # noqa: E731

    words = jnp.where(has(Features.ALLOWED)[:, None], masks & extras.allowed, masks)
    logits = jnp.where(unpacked(words, vocab)[:, None, :], logits, -jnp.inf)

    length = ints[:, Ints.LENGTH, None] + jnp.arange(width, dtype=jnp.int32)
    early = has(Features.MIN_TOKENS)[:, None] & (length < ints[:, Ints.MIN_LENGTH, None])
    stops = jnp.where(early[:, :, None], extras.stops[:, None, :], vocab)
    ends = _banned_next(slots, ids, ints, drafts, extras.banned)
    ends = jnp.where(has(Features.BANNED)[:, None, None], ends, vocab)
    forbidden = jnp.concatenate([stops, ends], axis=2)
    row, column = jnp.arange(rows)[:, None, None], jnp.arange(width)[None, :, None]
    logits = logits.at[row, column, forbidden].set(-jnp.inf, mode="drop")

    biased = jnp.where(has(Features.BIAS)[:, None], extras.bias_ids, vocab)
    logits = logits.at[jnp.arange(rows)[:, None], :, biased].add(extras.bias_values[:, :, None], mode="drop")
    return penalized(logits, _counts(slots, ids, drafts), floats)


def penalized(logits: Array, counts: Array, floats: Array) -> Array:
    """Repetition penalty over prompt and output, presence and frequency penalties over output.

    counts: int32 [R, q, V] with IN_PROMPT; a slot without penalties has neutral floats, so what its counts hold is
    without effect.
    """
    repetition = floats[:, Floats.REPETITION, None, None]
    frequency = floats[:, Floats.FREQUENCY, None, None]
    presence = floats[:, Floats.PRESENCE, None, None]
    generated = counts & (IN_PROMPT - 1)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts != 0, repeated, logits)
    return logits - frequency * generated.astype(jnp.float32) - presence * (generated > 0).astype(jnp.float32)


def unpacked(words: Array, vocab: int) -> Array:
    """uint32 [R, ceil(vocab / 32)] -> bool [R, vocab]."""
    bits = (words[:, :, None] >> jnp.arange(WORD_BITS, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab] != 0


class _Extras(NamedTuple):
    """Rows of `Slots.extras`, unpacked."""

    bias_ids: Array
    bias_values: Array
    stops: Array
    banned: Array
    allowed: Array


def _split(extras: Array, vocab: int) -> _Extras:
    offsets = extras_offsets(vocab)
    ids, values, stops, banned, allowed = (
        extras[:, begin:end] for begin, end in zip(offsets[:-1], offsets[1:], strict=True)
    )
    return _Extras(
        ids,
        jax.lax.bitcast_convert_type(values, jnp.float32),
        stops,
        banned.reshape(-1, MAX_BANNED, BANNED_TOKENS),
        jax.lax.bitcast_convert_type(allowed, jnp.uint32),
    )


def _counts(slots: Slots, ids: Array, drafts: Array) -> Array:
    """int32 [R, q, V]: counts of each position, the drafts before it included."""
    counts = slots.counts.at[ids].get(mode="fill", fill_value=0)
    rows, width = drafts.shape[0], drafts.shape[1] + 1
    counts = jnp.broadcast_to(counts[:, None, :], (rows, width, counts.shape[1]))
    draft, later = np.triu_indices(width, 1)
    return counts.at[jnp.arange(rows)[:, None], later, drafts[:, draft]].add(1, mode="drop")


def _banned_next(slots: Slots, ids: Array, ints: Array, drafts: Array, banned: Array) -> Array:
    """int32 [R, q, MAX_BANNED]: last tokens of the banned sequences whose other tokens end the output so far; the rest
    are out of range. A sequence's first tokens may not lie in the prompt."""
    rows, width = drafts.shape[0], drafts.shape[1] + 1
    before = BANNED_TOKENS - 1
    position = ints[:, Ints.LENGTH, None] + jnp.arange(-before, 0, dtype=jnp.int32)
    past = slots.tokens.at[ids[:, None], jnp.maximum(position, 0)].get(mode="fill", fill_value=0)
    past = jnp.where(position >= ints[:, Ints.PROMPT_LENGTH, None], past, -2)
    history = jnp.concatenate([past, drafts], axis=1)
    window = jnp.stack([history[:, j : j + before] for j in range(width)], axis=1)  # [R, q, 7]
    prefix, last = banned[:, None, :, :before], banned[:, None, :, before]
    matches = jnp.all((prefix == -1) | (prefix == window[:, :, None, :]), axis=3)
    return jnp.where(matches & (last >= 0), jnp.broadcast_to(last, (rows, width, MAX_BANNED)), slots.counts.shape[1])
