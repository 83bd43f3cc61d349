"""Prompt look-up against a plain search."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.sampling.state import Ints, SlotLayout, allocate
from jaxserve.speculative.ngram import NGram

SIZE, WIDTH = 40, 4
LAYOUT = SlotLayout(slots=3, max_len=SIZE, vocab=8, hidden_rows=1, hidden_dim=1, q=WIDTH + 1)
PROPOSER = NGram(max_n=4, min_n=2)
propose = jax.jit(lambda slots, ids: PROPOSER.propose(slots, ids))


def proposals(*histories, ids=(0, 1, 2)):
    tokens, ints = np.full((3, SIZE), 7, np.int32), np.zeros((3, len(Ints)), np.int32)
    for slot, history in enumerate(histories):
        tokens[slot, : len(history)] = history
        ints[slot, Ints.LENGTH] = len(history)
    slots = dataclasses.replace(allocate(LAYOUT), tokens=jnp.array(tokens), ints=jnp.array(ints))
    drafts, found = propose(slots, np.array(ids, np.int32))
    return [row[:count].tolist() for row, count in zip(np.asarray(drafts), np.asarray(found), strict=True)]


def search(history):
    for n in range(PROPOSER.max_n, PROPOSER.min_n - 1, -1):
        tail = history[-n:]
        for start in range(len(history) - n - 1, -1, -1):
            if len(tail) == n and history[start : start + n] == tail:
                follow = history[start + n :]
                return [follow[i % len(follow)] for i in range(WIDTH)]
    return []


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=SIZE), min_size=3, max_size=3))
def test_proposals_are_those_of_a_plain_search(histories):
    assert proposals(*histories) == [search(history) for history in histories]


def test_longest_match_wins_then_the_most_recent():
    assert proposals([1, 2, 3, 5, 4, 2, 3, 6, 0, 1, 2, 3])[0][:2] == [5, 4]
    assert proposals([2, 3, 5, 0, 2, 3, 6, 1, 4, 2, 3])[0][:2] == [6, 1]


def test_a_loop_continues_and_padding_proposes_nothing():
    assert proposals([5, 1, 2, 1, 2, 1, 2], ids=(0, 3, 1)) == [[1, 2, 1, 2], [], []]


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="min_n=3, max_n=2"):
        NGram(max_n=2, min_n=3)
