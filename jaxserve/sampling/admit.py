"""Filling a slot: a request's tokens and parameters become one vector on the host, which the device unpacks.

One transfer and one dispatch for most sequences; those with penalties, bias, masks or min_tokens need the second pair
(`pack_extras`, `admit_extras`), after the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.sampling import bitmask
from jaxserve.sampling.keys import choice_key, seed_words
from jaxserve.sampling.state import (
    BANNED_TOKENS,
    EXTRAS,
    IN_PROMPT,
    MAX_BANNED,
    MAX_BIAS,
    MAX_STOPS,
    Features,
    Floats,
    Ints,
    SlotLayout,
    Slots,
    extras_offsets,
)
from jaxserve.types import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""

_SEED = len(Ints)
_CHOICE = _SEED + 2
_FLOATS = _CHOICE + 1
_TOKENS = _FLOATS + len(Floats)


def features_of(params: SamplingParams, banned: Sequence[Sequence[int]] = ()) -> Features:
    """The features of the FULL head that a sequence uses. banned: token sequences of `params.bad_words`."""
    features = Features.NONE
    if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
        features |= Features.PENALTIES
    if params.logit_bias:
        features |= Features.BIAS
    if params.allowed_token_ids is not None or params.banned_token_ids:
        features |= Features.ALLOWED
    if banned or params.bad_words:
        features |= Features.BANNED
    if params.min_tokens > 0:
        features |= Features.MIN_TOKENS
    if params.logprobs is not None:
        features |= Features.LOGPROBS
    return features


def is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW


def pack_admit_size(layout: SlotLayout) -> int:
    """Length of the vectors of `pack_admit`."""
    return _TOKENS + layout.max_len


def pack_admit(
    layout: SlotLayout,
    tokens: Sequence[int],
    prompt_length: int,
    params: SamplingParams,
    choice: int = 0,
    banned: Sequence[Sequence[int]] = (),
) -> np.ndarray:
    """int32 vector of one size per layout, for `admit`.

    tokens: all known tokens; those after `prompt_length` were generated before a preemption. params: resolved (`seed`
    and `max_tokens` set). Raises ValueError where the slot cannot hold the sequence.
    """
    if params.seed is None or params.max_tokens is None:
        raise ValueError("SamplingParams must be resolved before admission: seed and max_tokens are required.")
    if not 0 < prompt_length <= len(tokens) <= layout.max_len:
        raise ValueError(
            f"A slot holds 1 to {layout.max_len} tokens; got {len(tokens)}, of which {prompt_length} are the prompt."
        )
    packed = np.zeros(pack_admit_size(layout), np.int32)
    packed[Ints.LENGTH] = len(tokens)
    packed[Ints.PROMPT_LENGTH] = prompt_length
    packed[Ints.LIMIT] = min(prompt_length + params.max_tokens, layout.max_len)
    packed[Ints.MIN_LENGTH] = min(prompt_length + params.min_tokens, layout.max_len)
    packed[Ints.TOP_K] = min(params.top_k, layout.vocab)
    packed[Ints.FEATURES] = int(features_of(params, banned))
    packed[_SEED:_CHOICE] = seed_words(params.seed).view(np.int32)
    packed[_CHOICE] = choice
    floats = np.zeros(len(Floats), np.float32)
    floats[Floats.TEMPERATURE] = 0.0 if is_greedy(params) else params.temperature
    floats[Floats.TOP_P] = params.top_p
    floats[Floats.MIN_P] = params.min_p
    floats[Floats.REPETITION] = params.repetition_penalty
    floats[Floats.PRESENCE] = params.presence_penalty
    floats[Floats.FREQUENCY] = params.frequency_penalty
    packed[_FLOATS:_TOKENS] = floats.view(np.int32)
    packed[_TOKENS : _TOKENS + len(tokens)] = tokens
    return packed


def admit(slots: Slots, slot: Array, packed: Array) -> Slots:
    """Unpacks a vector of `pack_admit` into `slot`. Nothing of the slot's last sequence is visible afterwards."""
    packed = jnp.asarray(packed)
    ints = packed[: len(Ints)]
    words = jax.lax.bitcast_convert_type(packed[_SEED:_CHOICE], jnp.uint32)
    key = jax.lax.bitcast_convert_type(choice_key(words, packed[_CHOICE]), jnp.int32)
    ints = ints.at[Ints.KEY_HIGH].set(key[0]).at[Ints.KEY_LOW].set(key[1])
    floats = jax.lax.bitcast_convert_type(packed[_FLOATS:_TOKENS], jnp.float32)
    put = lambda array, row: jax.lax.dynamic_update_slice_in_dim(array, row[None], slot, axis=0)  # noqa: E731
    return dataclasses.replace(
        slots,
        tokens=put(slots.tokens, packed[_TOKENS:]),
        ints=put(slots.ints, ints),
        floats=put(slots.floats, floats),
    )


def pack_extras(
    layout: SlotLayout,
    params: SamplingParams,
    eos_ids: Sequence[int] = (),
    banned: Sequence[Sequence[int]] = (),
) -> np.ndarray | None:
    """int32 [layout.extras] for `admit_extras`; None when the sequence needs none.

    Raises ValueError for an id outside the vocabulary and for lists longer than the slot's.
    """
    if not features_of(params, banned) & EXTRAS:
        return None
    bias = params.logit_bias or {}
    # vLLM also masks end-of-sequence tokens that `ignore_eos` would pass over.
    stops = sorted({*eos_ids, *params.stop_token_ids})
    for name, size, most in (
        ("logit_bias tokens", len(bias), MAX_BIAS),
        ("stop tokens", len(stops), MAX_STOPS),
        ("banned sequences", len(banned), MAX_BANNED),
        ("tokens in a banned sequence", max(map(len, banned), default=0), BANNED_TOKENS),
    ):
        if size > most:
            raise ValueError(f"{size} {name}: at most {most} are supported.")
    bitmask.of_tokens(layout.vocab, [*bias, *stops, *(token for sequence in banned for token in sequence)])

    packed = np.zeros(layout.extras, np.int32)
    ids, values, stop, ban, allow, _ = extras_offsets(layout.vocab)
    packed[ids:values] = layout.vocab  # out of range: dropped by the scatter
    packed[ids : ids + len(bias)] = list(bias)
    packed[values : values + len(bias)] = np.array(list(bias.values()), np.float32).view(np.int32)
    packed[stop:ban] = layout.vocab
    packed[stop : stop + len(stops)] = stops
    table = np.full((MAX_BANNED, BANNED_TOKENS), -1, np.int32)
    for row, sequence in zip(table, banned, strict=False):
        if sequence:
            row[-len(sequence) :] = sequence
    packed[ban:allow] = table.reshape(-1)
    mask = bitmask.allowed_mask(layout.vocab, params.allowed_token_ids, params.banned_token_ids)
    packed[allow:] = mask.view(np.int32)
    return packed


def admit_extras(slots: Slots, slot: Array, packed: Array) -> Slots:
    """Writes a vector of `pack_extras` and rebuilds the token counts from the history that `admit` wrote."""
    put = lambda array, row: jax.lax.dynamic_update_slice_in_dim(array, row[None], slot, axis=0)  # noqa: E731
    tokens = jax.lax.dynamic_index_in_dim(slots.tokens, slot, keepdims=False)
    ints = jax.lax.dynamic_index_in_dim(slots.ints, slot, keepdims=False)
    vocab = slots.counts.shape[1]
    position = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    in_prompt = position < ints[Ints.PROMPT_LENGTH]
    generated = ~in_prompt & (position < ints[Ints.LENGTH])
    counts = jnp.zeros((vocab,), jnp.int32).at[jnp.where(generated, tokens, vocab)].add(1, mode="drop")
    prompt = jnp.zeros((vocab,), bool).at[jnp.where(in_prompt, tokens, vocab)].set(True, mode="drop")
    counts = counts | jnp.where(prompt, IN_PROMPT, 0)
    return dataclasses.replace(slots, extras=put(slots.extras, packed), counts=put(slots.counts, counts))
