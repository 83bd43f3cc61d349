"""The three heads through their one door: logits in, appended tokens out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sampling.admit import admit, admit_extras, pack_admit, pack_extras
from jaxserve.sampling.bitmask import allowed_mask
from jaxserve.sampling.head import HeadVariant, head, variant_for
from jaxserve.sampling.logprobs import prompt_logprobs
from jaxserve.sampling.state import Ints, SlotLayout, allocate, decode_inputs
from jaxserve.speculative.ngram import NGram
from jaxserve.types import SamplingParams

GREEDY, SAMPLE, FULL = HeadVariant
jit_admit, jit_extras = jax.jit(admit), jax.jit(admit_extras)
PLAIN = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_k": 5, "seed": 2},
    {"temperature": 1.2, "top_p": 0.9, "seed": 3},
    {"temperature": 1.0, "min_p": 0.05, "top_k": 30, "top_p": 0.95, "seed": 2**63 + 4},
]


def logits_of(seed, rows=1, vocab=64):
    return np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * 2


@pytest.mark.parametrize(
    "params, variant",
    [
        ({"temperature": 0.0}, GREEDY),
        ({"temperature": 1e-6, "top_p": 0.5, "top_k": 3}, GREEDY),
        ({}, SAMPLE),
        ({"temperature": 0.0, "stop_token_ids": (3,), "ignore_eos": True}, GREEDY),
        ({"temperature": 0.0, "logprobs": 0}, FULL),
        ({"presence_penalty": 0.1}, FULL),
        ({"repetition_penalty": 1.1}, FULL),
        ({"logit_bias": {1: 2.0}}, FULL),
        ({"allowed_token_ids": ()}, FULL),
        ({"banned_token_ids": (4,)}, FULL),
        ({"bad_words": ("a",)}, FULL),
        ({"min_tokens": 3}, FULL),
    ],
)
def test_a_request_takes_the_least_head_that_serves_it(params, variant):
    assert variant_for(SamplingParams(**params)) is variant


def test_min_tokens_needs_the_full_head_until_they_are_there():
    params = SamplingParams(temperature=0.0, min_tokens=3)
    assert [variant_for(params, n) for n in (0, 2, 3)] == [FULL, FULL, GREEDY]
    assert variant_for(params, 3, grammar=True) is FULL


def test_tokens_are_appended_and_positions_advance(crowd):
    c = crowd()
    c.admit(2, [5, 6, 7], temperature=0.0)
    out = c.step(GREEDY, {2: logits_of(1)})
    token = int(logits_of(1).argmax())
    assert out.count.tolist() == [1, 0, 0, 0, 0, 0] and out.tokens[0, 0] == token
    assert c.history(2) == [5, 6, 7, token]
    tokens, positions, real = decode_inputs(c.slots, jnp.array([2, 6]), 1)
    assert (tokens[0, 0], positions[0, 0]) == (token, 3) and real.tolist() == [1, 0]


def test_the_variant_does_not_change_a_token(crowd):
    tokens = {}
    for variant in (SAMPLE, FULL):
        c = crowd()
        for slot, params in enumerate(PLAIN):
            c.admit(slot, [1, 2, 3], **params)
        steps = [
            c.step(variant, {i: logits_of([step, i]) for i in range(len(PLAIN))}).tokens[:5, 0] for step in range(20)
        ]
        tokens[variant] = np.stack(steps)
    assert np.array_equal(tokens[SAMPLE], tokens[FULL])
    assert tokens[SAMPLE][:, 0].tolist() == [int(logits_of([step, 0]).argmax()) for step in range(20)]


@pytest.mark.parametrize("variant", [SAMPLE, FULL])
def test_alone_and_in_a_crowd(crowd, variant):
    """Other slot, other row, other companions, another bucket: the same tokens."""
    for mine in PLAIN:
        alone, together = crowd(), crowd()
        alone.admit(0, [1, 2, 3], **mine)
        for slot, params in enumerate(PLAIN):
            together.admit(slot, [9] * (slot + 1), choice=slot, **{**params, "top_k": 40 + slot, "seed": 77})
        together.admit(5, [1, 2, 3], **mine)
        for step in range(8):
            others = {slot: logits_of([step, slot, 1]) for slot in range(len(PLAIN))}
            a = alone.step(variant, {0: logits_of(step)}, size=1)
            b = together.step(variant, {**others, 5: logits_of(step)})
            assert a.tokens[0, 0] == b.tokens[5, 0]


def test_choices_and_seeds_differ_and_repeat(crowd):
    def run(seed, choice):
        c = crowd()
        c.admit(0, [1], seed=seed, choice=choice)
        return [int(c.step(SAMPLE, {0: logits_of(step)}).tokens[0, 0]) for step in range(12)]

    runs = [run(1, 0), run(1, 1), run(1, 2), run(2, 0), run(1 + 2**35, 0)]
    assert len({tuple(tokens) for tokens in runs}) == len(runs)
    assert run(1, 1) == runs[1]


def test_a_resumed_sequence_continues_as_if_never_preempted(crowd):
    params = {
        "temperature": 1.0,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
        "seed": 4,
    }
    whole = crowd()
    whole.admit(0, [1, 2, 3], **params)
    for step in range(6):
        whole.step(FULL, {0: logits_of(step)})
    resumed = crowd()
    resumed.admit(4, [60, 61], presence_penalty=2.0)
    resumed.admit(4, whole.history(0), 3, **params)
    assert np.array_equal(whole.slots.counts[0], resumed.slots.counts[4])
    for step in range(6, 12):
        a, b = whole.step(FULL, {0: logits_of(step)}), resumed.step(FULL, {4: logits_of(step)})
        assert a.tokens[0, 0] == b.tokens[0, 0]


def test_penalties(crowd):
    repetition, presence, frequency = 1.5, 0.7, 0.4
    prompt, output = [3, 4, 5, 5], [5, 6, 6, 6, 4]
    expected = logits_of(7)[0].astype(np.float64)
    for token in {*prompt, *output}:
        expected[token] *= 1 / repetition if expected[token] > 0 else repetition
    for token in output:
        expected[token] -= frequency
    for token in set(output):
        expected[token] -= presence
    order = np.argsort(-expected)
    c = crowd()
    for slot, rank in enumerate((0, 1, 5, 63)):  # the token of a rank wins once all better ones are banned
        c.admit(
            slot,
            prompt + output,
            len(prompt),
            temperature=0.0,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            banned_token_ids=order[:rank].tolist(),
        )
    out = c.step(FULL, {slot: logits_of(7) for slot in range(4)})
    assert out.tokens[:4, 0].tolist() == order[[0, 1, 5, 63]].tolist()


def test_bias_allowed_banned_and_grammar(crowd):
    logits = logits_of(8)
    order = np.argsort(-logits[0]).tolist()
    c = crowd()
    c.admit(0, [1], temperature=0.0, logit_bias={order[40]: 100.0, order[41]: 99.0})
    c.admit(1, [1], temperature=0.0, allowed_token_ids=[order[9], order[7]])
    c.admit(2, [1], temperature=0.0, banned_token_ids=order[:3])
    c.admit(3, [1], temperature=1.0, allowed_token_ids=[order[60]])
    c.admit(4, [1], temperature=1.0)
    c.admit(5, [1], temperature=0.0, logit_bias={order[0]: -100.0})
    masks = np.stack([allowed_mask(64, None)] * 6)
    masks[4] = allowed_mask(64, [order[30]])
    out = c.step(FULL, {slot: logits for slot in range(6)}, masks)
    assert out.tokens[:, 0].tolist() == [order[i] for i in (40, 7, 3, 60, 30, 1)]


def test_banned_sequences_end_only_after_their_beginning_was_generated(crowd):
    logits = logits_of(9)
    first, second = np.argsort(-logits[0])[:2].tolist()
    banned = [[10, 11, first], [first, 20, first]]
    c = crowd()
    c.admit(0, [1, 10, 11], 1, temperature=0.0, banned=banned)
    c.admit(1, [10, 11], 2, temperature=0.0, banned=banned)  # the beginning lies in the prompt
    c.admit(2, [1, 11, 10], 1, temperature=0.0, banned=banned)
    c.admit(3, [1, 11], 1, temperature=0.0, banned=[[first]])
    c.admit(4, [1, first, 20], 1, temperature=0.0, banned=banned)
    c.admit(5, [1, 10, 11], 1, temperature=0.0)
    out = c.step(FULL, {slot: logits for slot in range(6)})
    assert out.tokens[:, 0].tolist() == [second, first, first, second, second, first]


def test_min_tokens_masks_end_and_stop_tokens_until_it_is_reached(crowd):
    logits = logits_of(10)
    eos, stop, other = np.argsort(-logits[0])[:3].tolist()
    c = crowd()
    c.admit(0, [1, 2], temperature=0.0, min_tokens=2, eos=[eos], stop_token_ids=[stop])
    c.admit(1, [1, 2], temperature=0.0, eos=[eos])
    tokens = [c.step(FULL, {0: logits, 1: logits}).tokens[:2, 0].tolist() for _ in range(3)]
    assert tokens == [[other, eos], [other, eos], [eos, eos]]


def test_a_reused_slot_inherits_nothing(crowd):
    c = crowd()
    logits = logits_of(11)
    best = int(logits.argmax())
    c.admit(0, [1, best, best], 1, temperature=0.0, presence_penalty=2.0, logit_bias={best: -100.0}, min_tokens=9,
            banned_token_ids=[best], banned=[[best]], eos=[best])  # fmt: skip
    c.step(FULL, {0: logits})
    c.admit(0, [1, 2], temperature=0.0, logprobs=1)
    assert c.step(FULL, {0: logits}).tokens[0, 0] == best


@pytest.mark.parametrize("variant", HeadVariant)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_flagged_and_hurt_nobody_else(crowd, variant, bad):
    c = crowd()
    temperature = 0.0 if variant is GREEDY else 1.0
    for slot in range(3):
        c.admit(slot, [1, 2], temperature=temperature, seed=slot)
    rows = {slot: logits_of(slot) for slot in range(3)}
    rows[1] = rows[1].copy()
    rows[1][0, 7] = bad
    out = c.step(variant, rows)
    assert out.count[:3].tolist() == [1, -1, 1]
    assert [len(c.history(slot)) for slot in range(3)] == [3, 2, 3]


def test_a_row_without_an_allowed_token_is_flagged(crowd):
    c = crowd()
    c.admit(0, [1, 2], allowed_token_ids=[])
    c.admit(1, [1, 2])
    out = c.step(FULL, {0: logits_of(0), 1: logits_of(1)})
    assert out.count[:2].tolist() == [-1, 1] and c.history(0) == [1, 2]


def test_nothing_is_appended_past_the_limit(crowd):
    c = crowd(max_len=8)
    c.admit(0, [1, 2], max_tokens=1, temperature=0.0)
    c.admit(1, [1, 2, 3, 4, 5, 6], max_tokens=50, temperature=0.0)
    counts = [c.step(GREEDY, {0: logits_of(0), 1: logits_of(1)}).count[:2].tolist() for _ in range(3)]
    assert counts == [[1, 1], [0, 1], [0, 0]]


def test_logprobs_are_of_the_raw_logits(crowd):
    c = crowd()
    logits = logits_of(12)
    exact = logits[0].astype(np.float64)
    exact -= np.log(np.exp(exact).sum())
    best = int(exact.argmax())
    c.admit(0, [1], temperature=0.3, logprobs=5, logit_bias={best: -50.0}, seed=3)
    out = c.step(FULL, {0: logits})
    token = out.tokens[0, 0]
    assert token != best
    np.testing.assert_allclose(out.logprobs.logprob[0, 0], exact[token], rtol=1e-5)
    assert out.logprobs.rank[0, 0] == 1 + (exact > exact[token]).sum()
    order = np.argsort(-exact)[:20]
    assert out.logprobs.top_ids[0, 0].tolist() == order.tolist()
    np.testing.assert_allclose(out.logprobs.top_logprobs[0, 0], exact[order], rtol=1e-5)


def test_prompt_logprobs_of_a_tile():
    vocab = 30
    layout = SlotLayout(slots=2, max_len=128, vocab=vocab, hidden_rows=80, hidden_dim=vocab)
    prompt = np.random.default_rng(0).integers(vocab, size=100).tolist()
    params = SamplingParams(seed=0, max_tokens=1)
    slots = jit_admit(allocate(layout), 1, pack_admit(layout, prompt, 100, params))
    logits = logits_of(13, 80, vocab)
    slots = dataclasses.replace(slots, hidden=jnp.array(logits))
    score = jax.jit(lambda slots, slot, start, base: prompt_logprobs(lambda h: h, slots, slot, start, base))
    got = jax.device_get(score(slots, 1, 64, 16))
    exact = logits[16:].astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for i in range(35):  # positions 64..98 have a known token after them
        target = prompt[64 + i + 1]
        np.testing.assert_allclose(got.logprob[i], exact[i, target], rtol=1e-5)
        assert got.rank[i] == 1 + (exact[i] > exact[i, target]).sum()
        assert got.top_ids[i, 0] == exact[i].argmax()


@pytest.mark.parametrize("variant, q, proposer", [(GREEDY, 1, None), (SAMPLE, 1, None), (FULL, 4, NGram())])
def test_big_arrays_are_updated_in_place(variant, q, proposer):
    layout = SlotLayout(slots=8, max_len=512, vocab=1000, hidden_rows=80, hidden_dim=16, q=q)
    slots = allocate(layout)
    rows = np.zeros((4, 1 + q), np.int32)
    masks = np.zeros((4, 32), np.uint32) if variant is FULL else None
    step = jax.jit(
        lambda s, r, m: head(lambda h: h @ jnp.ones((16, 1000)), s, r, m, variant, proposer), donate_argnums=0
    )
    text = step.lower(slots, rows, masks).compile().as_text()
    for name in ("tokens", "counts", "hidden", "extras"):
        leaf = getattr(slots, name)
        shape = f"{'f32' if leaf.dtype == jnp.float32 else 's32'}[{','.join(map(str, leaf.shape))}]"
        copies = [line for line in text.splitlines() if f" {shape}" in line and " copy(" in line]
        assert not copies, (name, copies)
    before = {name: getattr(slots, name).unsafe_buffer_pointer() for name in ("tokens", "ints", "counts")}
    after, _ = step(slots, rows, masks)
    assert before == {name: getattr(after, name).unsafe_buffer_pointer() for name in before}


def test_admission_refuses_what_a_slot_cannot_hold():
    layout = SlotLayout(slots=1, max_len=8, vocab=10, hidden_rows=1, hidden_dim=4)
    ready = SamplingParams(seed=0, max_tokens=4)
    with pytest.raises(ValueError, match="seed and max_tokens"):
        pack_admit(layout, [1], 1, SamplingParams())
    for tokens, prompt in (([], 0), ([1] * 9, 9), ([1], 2)):
        with pytest.raises(ValueError, match="1 to 8 tokens"):
            pack_admit(layout, tokens, prompt, ready)
    for params, message in (
        ({"logit_bias": {10: 1.0}}, "Token 10 is outside"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "301 logit_bias tokens: at most 300"),
        ({"min_tokens": 1, "stop_token_ids": tuple(range(81))}, "81 stop tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_extras(layout, SamplingParams(**params))
    with pytest.raises(ValueError, match="9 tokens in a banned sequence"):
        pack_extras(layout, ready, banned=[[1] * 9])
    assert pack_extras(layout, ready) is None


def test_admit_changes_one_slot_only():
    layout = SlotLayout(slots=3, max_len=16, vocab=40, hidden_rows=1, hidden_dim=4, q=3)
    slots = allocate(layout)
    params = SamplingParams(seed=1, max_tokens=4, min_tokens=2, logit_bias={3: 1.0})
    for slot in (0, 2):
        slots = jit_admit(slots, slot, pack_admit(layout, [slot + 1] * 5, 5, params))
        slots = jit_extras(slots, slot, pack_extras(layout, params, (9,)))
    changed = jit_admit(slots, 1, pack_admit(layout, [7] * 6, 4, params))
    changed = jit_extras(changed, 1, pack_extras(layout, params, (9,)))
    for name in ("tokens", "ints", "floats", "counts", "extras"):
        before, after = np.asarray(getattr(slots, name)), np.asarray(getattr(changed, name))
        assert np.array_equal(before[[0, 2]], after[[0, 2]]) and not np.array_equal(before[1], after[1])
    ints = np.asarray(changed.ints[1])
    wanted = {Ints.LENGTH: 6, Ints.PROMPT_LENGTH: 4, Ints.LIMIT: 8, Ints.MIN_LENGTH: 6, Ints.DRAFT_LEN: 0}
    assert {column: ints[column] for column in wanted} == wanted
