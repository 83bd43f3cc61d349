"""Slots: the state that every running sequence has on the device. Knows nothing of requests, pages or the host.

A slot is a row of each array. `head` advances it, so the next forward can start before the host has seen a token.
Dispatch cost grows with the number of leaves, so scalars share two arrays and rarely used features share one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

MAX_BIAS = 300
MAX_STOPS = 80
"""End-of-sequence and stop tokens of a sequence together."""
MAX_BANNED = 32
BANNED_TOKENS = 8
WORD_BITS = 32


class Ints(IntEnum):
    """Columns of `Slots.ints`. Lengths count known tokens: prompt and generated."""

    LENGTH = 0
    PROMPT_LENGTH = 1
    LIMIT = 2
    """The length at which the sequence ends: nothing is appended past it."""
    MIN_LENGTH = 3
    """Below this length no stop token is drawn."""
    TOP_K = 4
    """0: no limit."""
    KEY_HIGH = 5
    KEY_LOW = 6
    """`fold_in(key(seed), choice)`."""
    DRAFT_LEN = 7
    """Tokens of `Slots.drafts` that the next forward verifies."""
    FEATURES = 8
    """Bits of `Features`."""


class Floats(IntEnum):
    """Columns of `Slots.floats`. Temperature 0 is greedy."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    REPETITION = 3
    PRESENCE = 4
    FREQUENCY = 5


class Features(IntFlag):
    """What a sequence uses of the FULL head. A feature that is off is not read, so a reused slot inherits nothing."""

    NONE = 0
    PENALTIES = 1
    BIAS = 2
    ALLOWED = 4
    BANNED = 8
    MIN_TOKENS = 16
    LOGPROBS = 32


EXTRAS = Features.PENALTIES | Features.BIAS | Features.ALLOWED | Features.BANNED | Features.MIN_TOKENS
"""Features whose data lies in `Slots.extras` and `Slots.counts`: `admit_extras` writes it."""

IN_PROMPT = 1 << 30
"""Bit of `Slots.counts`: the token occurs in the prompt. The bits below count generated occurrences."""


@dataclass(frozen=True)
class SlotLayout:
    """Sizes of the slot state.

    `q` is the widest verification row (1: no speculation), `hidden_rows` the most hidden rows that one forward leaves
    for heads, `vocab` the width of the logits.
    """

    slots: int
    max_len: int
    vocab: int
    hidden_rows: int
    hidden_dim: int
    q: int = 1
    dtype: str = "float32"

    @property
    def extras(self) -> int:
        return extras_offsets(self.vocab)[-1]


def mask_words(vocab: int) -> int:
    """Words of a token bitmask."""
    return -(-vocab // WORD_BITS)


def extras_offsets(vocab: int) -> tuple[int, ...]:
    """Where bias ids, bias values, stops, banned sequences and the allowed mask begin in a row of `Slots.extras`; the
    last entry is the row's width."""
    offsets = [0]
    for width in (MAX_BIAS, MAX_BIAS, MAX_STOPS, MAX_BANNED * BANNED_TOKENS, mask_words(vocab)):
        offsets.append(offsets[-1] + width)
    return tuple(offsets)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Device state of all sequences. A program gets the arrays that it writes, donated, and those that it only reads;
    in the tree of either the others are None.

    tokens  int32 [slots, max_len]          history: prompt, then generated tokens
    ints    int32 [slots, len(Ints)]
    floats  float32 [slots, len(Floats)]
    drafts  int32 [slots, q - 1]            proposed tokens after the history
    hidden  dtype [hidden_rows, hidden_dim] final-normed activations: forward writes, heads read
    counts  int32 [slots, vocab]            generated occurrences, and IN_PROMPT
    extras  int32 [slots, layout.extras]    bias, stops, banned sequences, allowed mask (floats and words bit-cast)
    """

    tokens: Array
    ints: Array
    floats: Array
    drafts: Array
    hidden: Array
    counts: Array
    extras: Array

    def only(self, names: Collection[str]) -> Slots:
        """The arrays named, None for the others: what a program does not get it need not be handed."""
        return Slots(*[array if name in names else None for name, array in vars(self).items()])  # type: ignore[arg-type]

    def merged(self, other: Slots) -> Slots:
        """What `other` has, and for the rest what this has."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Slots(*[mine if new is None else new for mine, new in pairs])


def shapes(layout: SlotLayout) -> Slots:
    """The same tree with `jax.ShapeDtypeStruct` leaves: for compiling ahead of time and for sizing memory."""
    of: Any = jax.ShapeDtypeStruct
    return Slots(
        tokens=of((layout.slots, layout.max_len), jnp.int32),
        ints=of((layout.slots, len(Ints)), jnp.int32),
        floats=of((layout.slots, len(Floats)), jnp.float32),
        drafts=of((layout.slots, layout.q - 1), jnp.int32),
        hidden=of((layout.hidden_rows, layout.hidden_dim), jnp.dtype(layout.dtype)),
        counts=of((layout.slots, layout.vocab), jnp.int32),
        extras=of((layout.slots, layout.extras), jnp.int32),
    )


def allocate(layout: SlotLayout) -> Slots:
    """Empty slots: length 0, everything off."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes(layout))


def decode_inputs(slots: Slots, ids: Array, q: int) -> tuple[Array, Array, Array]:
    """What a forward feeds for decode rows of the slots `ids` int32 [D] (out of range: padding).

    Returns tokens int32 [D, q] (last known token, then drafts), positions int32 [D, q] and how many of the q are real
    int32 [D] (0 for padding): 1 + DRAFT_LEN, at most q.
    """
    ints = slots.ints.at[ids].get(mode="fill", fill_value=0)
    last = jnp.maximum(ints[:, Ints.LENGTH] - 1, 0)
    token = slots.tokens.at[ids, last].get(mode="fill", fill_value=0)
    drafts = slots.drafts.at[ids, : q - 1].get(mode="fill", fill_value=0)
    tokens = jnp.concatenate([token[:, None], drafts], axis=1)
    real = jnp.minimum(1 + ints[:, Ints.DRAFT_LEN], q)
    real = jnp.where((ids >= 0) & (ids < slots.ints.shape[0]) & (ints[:, Ints.LENGTH] > 0), real, 0)
    return tokens, last[:, None] + jnp.arange(q, dtype=jnp.int32), real
