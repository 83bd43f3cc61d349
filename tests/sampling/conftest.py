import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sampling.admit import admit, admit_extras, pack_admit, pack_extras
from jaxserve.sampling.bitmask import all_allowed
from jaxserve.sampling.head import HeadVariant, Out, head
from jaxserve.sampling.state import SlotLayout, allocate
from jaxserve.types import SamplingParams

jit_admit = jax.jit(admit, donate_argnums=0)
jit_extras = jax.jit(admit_extras, donate_argnums=0)


@cache
def jit_head(variant, proposer=None):
    identity = lambda hidden: hidden.astype(jnp.float32)  # noqa: E731
    return jax.jit(lambda slots, rows, masks: head(identity, slots, rows, masks, variant, proposer), donate_argnums=0)


class Crowd:
    """Slots whose hidden rows are the logits themselves, so that a test says what the model thinks."""

    def __init__(self, vocab=64, slots=6, q=1, max_len=128):
        rows = max(slots, 8) * q
        self.layout = SlotLayout(slots, max_len, vocab, hidden_rows=rows, hidden_dim=vocab, q=q)
        self.slots = allocate(self.layout)

    def admit(self, slot, tokens, prompt_length=None, *, choice=0, eos=(), banned=(), **params):
        params = SamplingParams(**{"seed": 0, "max_tokens": 50, **params})
        length = len(tokens) if prompt_length is None else prompt_length
        self.slots = jit_admit(self.slots, slot, pack_admit(self.layout, tokens, length, params, choice, banned))
        extras = pack_extras(self.layout, params, eos, banned)
        if extras is not None:
            self.slots = jit_extras(self.slots, slot, extras)

    def step(self, variant, rows, masks=None, size=None, proposer=None) -> Out:
        """rows: {slot: logits [q, vocab]}, padded to `size` (default: one row a slot). Returns what the host sees."""
        q, size = self.layout.q, size or self.layout.slots
        hidden = np.zeros((self.layout.hidden_rows, self.layout.vocab), np.float32)
        packed = np.full((size, 1 + q), self.layout.slots, np.int32)
        packed[:, 1:] = np.arange(size * q).reshape(size, q) % len(hidden)
        for i, (slot, logits) in enumerate(rows.items()):
            packed[i, 0] = slot
            hidden[i * q : (i + 1) * q] = logits
        self.slots = dataclasses.replace(self.slots, hidden=jnp.array(hidden))
        if variant is HeadVariant.FULL and masks is None:
            masks = np.tile(all_allowed(self.layout.vocab), (size, 1))
        self.slots, out = jit_head(variant, proposer)(self.slots, packed, masks)
        return jax.device_get(out)

    def ints(self, slot):
        return np.asarray(self.slots.ints[slot])

    def history(self, slot):
        return np.asarray(self.slots.tokens[slot, : self.slots.ints[slot, 0]]).tolist()


@pytest.fixture
def crowd():
    return Crowd
