"""Speculation through the head: the same tokens as plain decoding, the right distribution, pages never straddled.

The model is a table: the logits of a position depend on the token there and a little on the position.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.sampling.admit import admit, admit_extras, pack_admit, pack_extras
from jaxserve.sampling.head import HeadVariant, head, variant_for
from jaxserve.sampling.state import Floats, Ints, SlotLayout, allocate, decode_inputs, mask_words
from jaxserve.speculative.ngram import NGram
from jaxserve.speculative.verify import appended, room
from jaxserve.types import PAGE_SIZES, PAGE_TOKENS, SamplingParams

VOCAB, SLOTS, MAX_LEN = 16, 4, 160
jit_admit, jit_extras = jax.jit(admit), jax.jit(admit_extras)


@dataclass(frozen=True)
class Fixed:
    """Proposes the same tokens each time."""

    tokens: tuple[int, ...]

    def propose(self, slots, ids):
        width = slots.drafts.shape[1]
        return jnp.tile(jnp.array(self.tokens[:width], jnp.int32), (len(ids), 1)), jnp.full(ids.shape, width, jnp.int32)


def layout(q):
    return SlotLayout(SLOTS, MAX_LEN, VOCAB, hidden_rows=SLOTS * q, hidden_dim=2 * VOCAB, q=q)


@cache
def step(q, variant, proposer, sharpness):
    """Forward of the table, then the head; also what the forward was asked to verify."""
    table = np.random.default_rng(1).normal(size=(2 * VOCAB, VOCAB)).astype(np.float32)
    table[:VOCAB] *= sharpness
    ids = np.arange(SLOTS, dtype=np.int32)
    rows = np.concatenate([ids[:, None], np.arange(SLOTS * q, dtype=np.int32).reshape(SLOTS, q)], axis=1)
    masks = np.full((SLOTS, mask_words(VOCAB)), 2**32 - 1, np.uint32) if variant is HeadVariant.FULL else None

    def run(slots):
        tokens, positions, real = decode_inputs(slots, jnp.asarray(ids), q)
        hidden = jnp.concatenate(
            [jax.nn.one_hot(tokens, VOCAB), jax.nn.one_hot(positions % VOCAB, VOCAB)], axis=2
        ).reshape(SLOTS * q, -1)
        slots, out = head(
            lambda h: h @ table, dataclasses.replace(slots, hidden=hidden), jnp.asarray(rows), masks, variant, proposer
        )
        return slots, out, positions[:, 0], real

    return jax.jit(run)


def generate(q, proposer, requests, sharpness=3.0, force=None):
    """Histories of `requests` (params, prompt) at their ends, steps taken, drafts verified and drafts that stood."""
    slots = allocate(layout(q))
    variant = max(variant_for(params) for params, _ in requests) if force is None else force
    for slot, (params, prompt) in enumerate(requests):
        slots = jit_admit(slots, slot, pack_admit(layout(q), prompt, len(prompt), params))
        extras = pack_extras(layout(q), params, (3,))
        if extras is not None:
            slots = jit_extras(slots, slot, extras)
    steps = verified = stood = 0
    while np.any(np.asarray(slots.ints)[:, Ints.LENGTH] < np.asarray(slots.ints)[:, Ints.LIMIT]):
        lengths = np.asarray(slots.ints[:, Ints.LENGTH])
        slots, out, first, real = jax.device_get(step(q, variant, proposer, sharpness)(slots))
        assert (out.count[: len(requests)] >= 0).all()
        assert np.array_equal(slots.ints[:, Ints.LENGTH], lengths + out.count)
        assert (first // PAGE_TOKENS == (first + np.maximum(real, 1) - 1) // PAGE_TOKENS).all()
        running = out.count > 0
        verified += out.drafted[running].sum()
        stood += out.count[running].sum() - running.sum()
        steps += 1
        slots = jax.tree.map(jnp.asarray, slots)
    histories = [np.asarray(slots.tokens[i, : slots.ints[i, Ints.LENGTH]]).tolist() for i in range(len(requests))]
    return histories, steps, verified, stood


def params(**kwargs):
    return SamplingParams(**{"seed": 5, "max_tokens": 90, **kwargs})


REQUESTS = {
    HeadVariant.GREEDY: [(params(temperature=0.0, max_tokens=n), [1, 2, 3] * n) for n in (7, 30, 40)],
    HeadVariant.SAMPLE: [
        (params(), [1, 2]),
        (params(temperature=0.3, top_p=0.9, seed=6), list(range(16)) * 4),
        (params(temperature=0.0), [5]),
        (params(temperature=0.5, top_k=2, seed=9), [7] * 60),
    ],
    HeadVariant.FULL: [
        (params(frequency_penalty=0.2, presence_penalty=0.3), [1, 2]),
        (params(temperature=0.0, repetition_penalty=1.2), list(range(16)) * 4),
        (params(temperature=0.0, min_tokens=80, logit_bias={3: 2.0, 5: -1.0}), [3]),
        (params(temperature=0.4, banned_token_ids=(2, 3), logprobs=2), [7] * 60),
    ],
}


@pytest.mark.parametrize("variant", HeadVariant)
def test_speculation_gives_the_tokens_of_plain_decoding(variant):
    plain, steps, verified, _ = generate(1, None, REQUESTS[variant])
    assert verified == 0
    speculated, fewer, verified, stood = generate(5, NGram(max_n=3, min_n=1), REQUESTS[variant])
    assert speculated == plain
    assert fewer < steps and 0 < stood < verified


def test_greedy_requests_do_not_depend_on_the_variant_that_verifies_them():
    requests = REQUESTS[HeadVariant.GREEDY]
    runs = [generate(5, NGram(max_n=3, min_n=1), requests, force=variant)[0] for variant in HeadVariant]
    assert runs[0] == runs[1] == runs[2]


def test_all_drafts_stand_and_none_stands():
    """Drafts of 4 for a model that always says 4, and for one that always says 9."""
    prompt, new = [1] * 60, 20
    (right,), steps, verified, stood = generate(
        4, Fixed((4, 4, 4)), [(params(temperature=0.0, max_tokens=new, logit_bias={4: 100.0}), prompt)]
    )
    assert right == prompt + [4] * new
    # 61 tokens after the first step; then rows of positions 60-63, 64-67, 68-71, 72-75, 76-78 (token 80 is the last).
    assert (steps, verified, stood) == (6, 14, 14)
    (wrong,), steps, _, stood = generate(
        4, Fixed((4, 4, 4)), [(params(temperature=0.0, max_tokens=new, logit_bias={9: 100.0}), prompt)]
    )
    assert wrong == prompt + [9] * new
    assert steps == new and stood == 0


def test_a_row_under_a_grammar_verifies_no_drafts():
    slots = allocate(layout(4))
    slots = jit_admit(slots, 0, pack_admit(layout(4), [1, 2], 2, params(temperature=0.0)))
    slots = dataclasses.replace(slots, drafts=slots.drafts + 4, ints=slots.ints.at[0, Ints.DRAFT_LEN].set(3))
    rows = jnp.array([[0, 0, 1, 2, 3]], jnp.int32)
    logits = lambda h: jnp.zeros((4, VOCAB)).at[:, 4].set(9.0)  # noqa: E731
    full = jax.jit(lambda slots, masks: head(logits, slots, rows, masks, HeadVariant.FULL)[1])
    for mask, count in ((2**32 - 1, 4), (0xFFFF, 4), (0xFFFE, 1)):
        out = full(slots, np.array([[mask]], np.uint32))
        assert out.count.tolist() == [count] and out.drafted.tolist() == [count - 1]


def chi_square(tokens, logits):
    expected = len(tokens) * np.asarray(jax.nn.softmax(logits.astype(np.float64)))
    return ((np.bincount(tokens, minlength=VOCAB) - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("draft", [0, 9])
def test_verified_rows_follow_the_model_distribution(draft):
    """The first token whether or not the draft stands, and the second where it stands, over many seeds."""
    rows = 20_000
    sizes = SlotLayout(rows, 8, VOCAB, hidden_rows=2, hidden_dim=VOCAB, q=2)
    logits = np.random.default_rng(2).normal(size=(2, VOCAB)).astype(np.float32)
    ints = np.zeros((rows, len(Ints)), np.int32)
    ints[:, [Ints.LENGTH, Ints.LIMIT, Ints.DRAFT_LEN]] = 2, 8, 1
    ints[:, [Ints.KEY_HIGH, Ints.KEY_LOW]] = np.random.default_rng(3).integers(2**31, size=(rows, 2))
    floats = np.zeros((rows, len(Floats)), np.float32)
    floats[:, [Floats.TEMPERATURE, Floats.TOP_P]] = 1.0
    slots = dataclasses.replace(
        allocate(sizes),
        ints=jnp.array(ints),
        floats=jnp.array(floats),
        drafts=jnp.full((rows, 1), draft, jnp.int32),
        hidden=jnp.array(logits),
    )
    index = np.stack([np.arange(rows), np.zeros(rows), np.ones(rows)], axis=1).astype(np.int32)
    out = jax.device_get(jax.jit(lambda s, r: head(lambda h: h, s, r, None, HeadVariant.SAMPLE)[1])(slots, index))
    stands = out.count == 2
    assert np.array_equal(stands, out.tokens[:, 0] == draft)
    for tokens, row in ((out.tokens[:, 0], logits[0]), (out.tokens[stands, 1], logits[1])):
        assert chi_square(tokens, row) < 44.3  # 15 degrees of freedom: p = 1e-4, and the seeds are fixed


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(PAGE_SIZES))
def test_room_ends_at_the_page_and_the_limit(length, limit, page):
    fits = [d for d in range(page) if (length - 1) // page == (length - 1 + d) // page and length + d + 1 <= limit]
    assert room(np.int32(length), np.int32(limit), page) == max(fits, default=0)


def test_drafts_stand_up_to_the_first_that_differs():
    drafts = np.array([[1, 2, 3]] * 5, np.int32)
    tokens = np.array([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9, 4]], np.int32)
    assert appended(jnp.array(tokens), jnp.array(drafts), jnp.array([3, 3, 3, 1, 0])).tolist() == [4, 2, 1, 2, 1]
