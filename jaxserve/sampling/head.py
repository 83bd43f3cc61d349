"""The head: from hidden rows to appended tokens, on the device. One pure function in three variants.

Knows slots and logits; not models (it is given the function that makes logits), pages or requests.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.sampling import draw
from jaxserve.sampling.admit import features_of, is_greedy
from jaxserve.sampling.keys import Purpose, random_bits
from jaxserve.sampling.logprobs import LogitsFn, Logprobs, logprobs_of, packed_width
from jaxserve.sampling.processors import process
from jaxserve.sampling.state import Features, Floats, Ints, Slots
from jaxserve.speculative import verify
from jaxserve.speculative.proposer import Proposer
from jaxserve.types import PAGE_TOKENS, SamplingParams


class HeadVariant(IntEnum):
    """How much a head does; a batch takes the maximum over its rows. A row's tokens do not depend on which it took."""

    GREEDY = 0
    SAMPLE = 1
    FULL = 2


def variant_for(params: SamplingParams, generated: int = 0, *, grammar: bool = False) -> HeadVariant:
    """The least variant that serves a sequence. `generated`: tokens it has generated, or a lower bound of that."""
    features = features_of(params)
    if features == Features.MIN_TOKENS and generated >= params.min_tokens:
        features = Features.NONE
    if features or grammar:
        return HeadVariant.FULL
    return HeadVariant.GREEDY if is_greedy(params) else HeadVariant.SAMPLE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Out:
    """What a head leaves for the host; read the properties after `jax.device_get`.

    packed: int32 [R, 2 + q]: count, drafted, tokens. `count` tokens were appended: 0 past the sequence's limit, -1 when
    its logits are not finite or every token is forbidden (the sequence cannot go on). `drafted`: drafts it verified, of
    which count - 1 stood unless the limit cut them.
    logprobs: [R, q, ...] of the raw logits, FULL only; rows without Features.LOGPROBS hold nothing meaningful.
    """

    packed: Array
    logprobs: Logprobs | None = None

    @property
    def count(self) -> np.ndarray:
        return np.asarray(self.packed)[:, 0]

    @property
    def drafted(self) -> np.ndarray:
        return np.asarray(self.packed)[:, 1]

    @property
    def tokens(self) -> np.ndarray:
        return np.asarray(self.packed)[:, 2:]


def head(
    logits_fn: LogitsFn,
    slots: Slots,
    rows: Array,
    masks: Array | None,
    variant: HeadVariant,
    proposer: Proposer | None = None,
    page_tokens: int = PAGE_TOKENS,
) -> tuple[Slots, Out]:
    """Draws the next tokens of R sequences and appends them.

    rows: int32 [R, 1 + q]: slot (out of range: padding), then the row of `slots.hidden` of each of its q positions; a
    sequence is in one row at most. Positions past its drafts are ignored. masks: uint32 [R, ceil(vocab / 32)] of tokens
    that a grammar allows, for FULL only; a row whose mask forbids anything verifies no drafts, because its mask holds
    for one position. Of the slots GREEDY needs no `floats`, and only FULL `counts` and `extras`. `page_tokens`: drafts
    that the next row verifies do not reach beyond a page.
    """
    ids, index = rows[:, 0], rows[:, 1:]
    count_rows, q = index.shape
    ints = slots.ints.at[ids].get(mode="fill", fill_value=0)
    if variant is not HeadVariant.GREEDY:
        floats = slots.floats.at[ids].get(mode="fill", fill_value=0)
    drafts = slots.drafts.at[ids, : q - 1].get(mode="fill", fill_value=0)
    drafted = jnp.minimum(ints[:, Ints.DRAFT_LEN], q - 1)

    raw = logits_fn(slots.hidden.at[index.reshape(-1)].get(mode="clip"))
    vocab = raw.shape[1]
    logits = raw
    if variant is HeadVariant.FULL:
        if masks is None:
            raise ValueError("The FULL head needs grammar masks; pass all ones where there is no grammar.")
        free = jnp.all(_all_set(masks, vocab), axis=1)
        drafted = jnp.where(free, drafted, 0)
        logits = process(raw.reshape(count_rows, q, vocab), slots, ids, ints, floats, drafts, masks).reshape(-1, vocab)

    top, greedy = draw.best(logits)
    finite = jnp.isfinite(top)
    if variant is HeadVariant.FULL:  # a mask may have hidden what is wrong
        finite &= jnp.isfinite(draw.best(raw)[0])
    tokens = greedy if variant is HeadVariant.GREEDY else _drawn(logits, top, greedy, ints, floats, q)
    tokens = tokens.reshape(count_rows, q)

    count = verify.appended(tokens, drafts, drafted)
    used = jnp.arange(q, dtype=jnp.int32) < count[:, None]
    count = jnp.clip(jnp.minimum(count, ints[:, Ints.LIMIT] - ints[:, Ints.LENGTH]), 0)
    broken = jnp.any(used & ~finite.reshape(count_rows, q), axis=1)
    count = jnp.where(broken, -1, count)

    slots = _append(slots, ids, ints, tokens, jnp.maximum(count, 0), variant)
    slots = _propose(slots, ids, proposer, page_tokens)
    packed = jnp.concatenate([count[:, None], drafted[:, None], tokens], axis=1)
    if variant is not HeadVariant.FULL:
        return slots, Out(packed)
    wanted = (ints[:, Ints.FEATURES] & int(Features.LOGPROBS)) != 0
    logprobs = jax.lax.cond(
        jnp.any(wanted),
        lambda: logprobs_of(raw, tokens.reshape(-1)).packed,
        lambda: jnp.zeros((count_rows * q, packed_width(vocab)), jnp.int32),
    )
    return slots, Out(packed, Logprobs(logprobs.reshape(count_rows, q, -1)))


def _drawn(logits: Array, top: Array, greedy: Array, ints: Array, floats: Array, q: int) -> Array:
    """int32 [R * q]: sampled tokens, greedy ones in rows of temperature 0."""
    each = lambda row: jnp.repeat(row, q, axis=0)  # noqa: E731
    temperature = each(floats[:, Floats.TEMPERATURE])
    is_greedy_row = temperature == 0
    neutral = lambda column, value: jnp.where(is_greedy_row, value, each(column))  # noqa: E731
    words = jax.lax.bitcast_convert_type(ints[:, Ints.KEY_HIGH : Ints.KEY_LOW + 1], jnp.uint32)
    positions = (ints[:, Ints.LENGTH, None] + jnp.arange(q, dtype=jnp.int32)).reshape(-1)
    sampled = draw.draw(
        logits,
        top,
        temperature=jnp.where(is_greedy_row, 1.0, temperature),
        top_k=neutral(ints[:, Ints.TOP_K], 0),
        top_p=neutral(floats[:, Floats.TOP_P], 1.0),
        min_p=neutral(floats[:, Floats.MIN_P], 0.0),
        bits=random_bits(each(words), positions, Purpose.SAMPLE),
    )
    return jnp.where(is_greedy_row, greedy, sampled)


def _append(slots: Slots, ids: Array, ints: Array, tokens: Array, count: Array, variant: HeadVariant) -> Slots:
    """Writes the first `count` tokens of each row into its history, its length and (FULL) its counts."""
    step = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    kept = step < count[:, None]
    position = jnp.where(kept, ints[:, Ints.LENGTH, None] + step, slots.tokens.shape[1])
    history = slots.tokens.at[ids[:, None], position].set(tokens, mode="drop")
    lengths = slots.ints.at[ids, Ints.LENGTH].add(count, mode="drop")
    counts = slots.counts
    if variant is HeadVariant.FULL:
        counts = counts.at[ids[:, None], jnp.where(kept, tokens, counts.shape[1])].add(1, mode="drop")
    return dataclasses.replace(slots, tokens=history, ints=lengths, counts=counts)


def _propose(slots: Slots, ids: Array, proposer: Proposer | None, page_tokens: int) -> Slots:
    """Stores the drafts that the next forward verifies, no more than page and length allow."""
    if proposer is None:
        return slots  # admission left DRAFT_LEN at 0
    drafts, found = proposer.propose(slots, ids)
    ints = slots.ints.at[ids].get(mode="fill", fill_value=0)
    found = jnp.minimum(found, verify.room(ints[:, Ints.LENGTH], ints[:, Ints.LIMIT], page_tokens))
    return dataclasses.replace(
        slots,
        drafts=slots.drafts.at[ids].set(drafts, mode="drop"),
        ints=slots.ints.at[ids, Ints.DRAFT_LEN].set(found, mode="drop"),
    )


def _all_set(masks: Array, vocab: int) -> Array:
    """bool, shape of masks: every bit of a real token is set."""
    last = 0xFFFFFFFF >> (-vocab % 32)
    full = jnp.full(masks.shape[1], 0xFFFFFFFF, jnp.uint32).at[-1].set(last)
    return (masks & full) == full
