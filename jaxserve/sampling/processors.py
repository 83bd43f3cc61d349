"""What the FULL head does to logits before a token is drawn: masks, bias, penalties. Pure arrays.

Order as in vLLM: grammar, allowed tokens, banned sequences, min_tokens, bias, penalties. Position j of a row sees the
drafts 0..j-1 as if they had been generated: it counts only if they are accepted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
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
    """float32 [R, q, V] -> the same, with forbidden tokens at -inf.

    ids: int32 [R] slots (out of range: padding); ints, floats: their rows; drafts: int32 [R, q - 1]; masks: uint32
    [R, ceil(V / 32)] of tokens that a grammar allows.
    """
    vocab = logits.shape[2]
    extras = slots.extras.at[ids].get(mode="fill", fill_value=0)
    bias_ids, bias_values, stops, banned, allowed, _ = _split(extras, vocab)
    has = lambda feature: (ints[:, Ints.FEATURES] & int(feature)) != 0  # noqa: E731

    words = jnp.where(has(Features.ALLOWED)[:, None], masks & allowed, masks)
    logits = jnp.where(unpacked(words, vocab)[:, None, :], logits, -jnp.inf)
    logits = jax.lax.cond(
        jnp.any(has(Features.BANNED)),
        lambda x: _forbid(x, _banned_next(slots, ids, ints, drafts, banned, has(Features.BANNED))),
        lambda x: x,
        logits,
    )
    length = ints[:, Ints.LENGTH, None] + jnp.arange(logits.shape[1], dtype=jnp.int32)
    early = has(Features.MIN_TOKENS)[:, None] & (length < ints[:, Ints.MIN_LENGTH, None])
    logits = _forbid(logits, jnp.where(early[:, :, None], stops[:, None, :], vocab))
    row = jnp.arange(logits.shape[0])[:, None]
    added = jnp.where(has(Features.BIAS)[:, None], bias_ids, vocab)
    logits = logits.at[row, :, added].add(bias_values[:, :, None], mode="drop")
    return jax.lax.cond(
        jnp.any(has(Features.PENALTIES)),
        lambda x: penalized(x, _counts(slots, ids, drafts), floats),
        lambda x: x,
        logits,
    )


def penalized(logits: Array, counts: Array, floats: Array) -> Array:
    """Repetition penalty over prompt and output, presence and frequency penalties over output. counts: int32
    [R, q, V] with IN_PROMPT."""
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


def _split(extras: Array, vocab: int) -> tuple[Array, ...]:
    """Rows of `Slots.extras` as bias ids, bias values, stops, banned sequences, allowed words, and what they span."""
    offsets = extras_offsets(vocab)
    ids, values, stops, banned, allowed = (
        extras[:, begin:end] for begin, end in zip(offsets[:-1], offsets[1:], strict=True)
    )
    return (
        ids,
        jax.lax.bitcast_convert_type(values, jnp.float32),
        stops,
        banned.reshape(-1, MAX_BANNED, BANNED_TOKENS),
        jax.lax.bitcast_convert_type(allowed, jnp.uint32),
        extras,
    )


def _forbid(logits: Array, tokens: Array) -> Array:
    """tokens: int32 [R, q, n]; ids out of range are dropped."""
    rows, width, _ = logits.shape
    row, column = jnp.arange(rows)[:, None, None], jnp.arange(width)[None, :, None]
    return logits.at[row, column, tokens].set(-jnp.inf, mode="drop")


def _counts(slots: Slots, ids: Array, drafts: Array) -> Array:
    """int32 [R, q, V]: counts of each position, the drafts before it included."""
    counts = slots.counts.at[ids].get(mode="fill", fill_value=0)
    rows, width = drafts.shape[0], drafts.shape[1] + 1
    counts = jnp.broadcast_to(counts[:, None, :], (rows, width, counts.shape[1]))
    for i in range(width - 1):
        later = jnp.arange(i + 1, width)[None, :]
        counts = counts.at[jnp.arange(rows)[:, None], later, drafts[:, i, None]].add(1, mode="drop")
    return counts


def _banned_next(slots: Slots, ids: Array, ints: Array, drafts: Array, banned: Array, active: Array) -> Array:
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
    matches &= (last >= 0) & active[:, None, None]
    return jnp.where(matches, jnp.broadcast_to(last, (rows, width, MAX_BANNED)), slots.counts.shape[1])
