"""The engine through its messages: the tokens of transformers, alone and in a crowd, with every feature on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxserve import bundled
from jaxserve.scheduler import replay
from jaxserve.types import Cancel, Control, FinishReason, program_key
from tests.engine.driver import Driver

SHAPE = {
    "kv_cache_dtype": "f32",
    "max_num_seqs": 8,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "decode_buckets": [8],
    "tile_buckets": [4],
    "wait_for_buckets": True,
}
PAGE_BYTES = 6 * 2 * 2 * 64 * 64 * 4
"""Of the bundled model: layers, K and V, KV heads, tokens, head_dim, float32."""


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(bundled.path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def driver(executables: str) -> Driver:
    return Driver(**SHAPE, compile_cache=executables)


@pytest.fixture(scope="module")
def invariant(executables: str) -> Driver:
    return Driver(**SHAPE, compile_cache=executables, batch_invariant=True)


@pytest.fixture(scope="module")
def speculative(executables: str) -> Driver:
    return Driver(
        **SHAPE, compile_cache=executables, batch_invariant=True, speculative_method="ngram", num_speculative_tokens=3
    )


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 2000, n).tolist() for n in lengths]


def greedy(reference: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_transformers(driver: Driver, reference: torch.nn.Module) -> None:
    """Prompts below, at and above a page, and longer than a step's token budget."""
    cases = prompts([1, 17, 63, 64, 65, 128, 300, 700])
    for index, prompt in enumerate(cases):
        driver.submit(str(index), prompt, max_tokens=24, ignore_eos=True)
    answers = driver.run()
    for index, prompt in enumerate(cases):
        answer = answers[str(index), 0]
        assert answer.tokens == greedy(reference, prompt, 24), f"prompt of {len(prompt)} tokens"
        assert answer.finish is FinishReason.LENGTH


def test_prefix_cache_gives_the_same_tokens(driver: Driver) -> None:
    prompt = prompts([200], seed=1)[0]
    first, second = driver.one(prompt, max_tokens=8), driver.one(prompt, max_tokens=8)
    other_tenant = driver.submit("salted", prompt, salt="tenant", max_tokens=8) or driver.run()["salted", 0]
    assert (first.cached_tokens, second.cached_tokens, other_tenant.cached_tokens) == (0, 192, 0)
    assert first.tokens == second.tokens == other_tenant.tokens


def test_generated_pages_are_cached_too(driver: Driver) -> None:
    prompt = prompts([60], seed=2)[0]
    answer = driver.one(prompt, max_tokens=80, ignore_eos=True)
    follow_up = driver.one([*prompt, *answer.tokens, 5], max_tokens=1)
    assert follow_up.cached_tokens == 128


def test_prompt_logprobs_are_those_of_transformers(driver: Driver, reference: torch.nn.Module) -> None:
    prompt = prompts([150], seed=3)[0]
    answer = driver.one(prompt, max_tokens=1, prompt_logprobs=3, logprobs=2)
    with torch.no_grad():
        expected = torch.log_softmax(reference(torch.tensor([prompt])).logits[0], -1)
    assert answer.prompt_logprobs is not None and len(answer.prompt_logprobs) == len(prompt)
    assert answer.prompt_logprobs[0] is None
    for position, entry in enumerate(answer.prompt_logprobs[1:], start=1):
        assert entry is not None and entry.ids[0] == prompt[position]
        row = expected[position - 1]
        assert entry.logprobs[0] == pytest.approx(row[prompt[position]].item(), abs=2e-4)
        assert entry.logprobs[1] == pytest.approx(row.max().item(), abs=2e-4)
        assert len(entry.ids) == 4
    sampled = answer.logprobs[0]
    assert sampled.ids[:2] == (int(expected[-1].argmax()),) * 2 and sampled.rank == 1 and len(sampled.ids) == 3


def test_a_request_has_the_same_bits_alone_and_in_a_crowd(invariant: Driver) -> None:
    prompt = prompts([140], seed=4)[0]
    params = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.9, "top_p": 0.9, "seed": 11, "logprobs": 5}
    alone = invariant.one(prompt, **params)
    for index, other in enumerate(prompts([9, 64, 333, 500, 77, 200], seed=5)):
        invariant.submit(f"other-{index}", other, max_tokens=60, ignore_eos=True, temperature=1.0, seed=index)
    invariant.submit("mine", prompt, salt="not the cached pages", **params)
    crowd = invariant.run()["mine", 0]
    assert crowd.tokens == alone.tokens
    assert crowd.logprobs == alone.logprobs


def test_choices_share_the_prompt_and_differ(invariant: Driver) -> None:
    for length in (64, 65, 100):
        prompt = prompts([length], seed=6)[0]
        invariant.submit("n", prompt, n=4, max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
        choices = invariant.run()
        tokens = [choices["n", i].tokens for i in range(4)]
        assert len({tuple(t) for t in tokens}) == 4
        again = invariant.submit("m", prompt, n=4, max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
        assert again is None
        repeated = invariant.run()
        assert [repeated["m", i].tokens for i in range(4)] == tokens


def test_preemption_changes_no_token(invariant: Driver, executables: str) -> None:
    cases = prompts([150, 200, 180, 130, 170, 190], seed=7)
    params = {"max_tokens": 120, "ignore_eos": True, "temperature": 0.8, "seed": 5, "repetition_penalty": 1.1}

    def all_tokens(driver: Driver) -> list[list[int]]:
        for index, prompt in enumerate(cases):
            driver.submit(str(index), prompt, **params)
        answers = driver.run()
        return [answers[str(i), 0].tokens for i in range(len(cases))]

    tight = Driver(**SHAPE, compile_cache=executables, batch_invariant=True, kv_cache_memory=17 * PAGE_BYTES)
    assert all_tokens(tight) == all_tokens(invariant)
    assert tight.counter("num_preemptions") > 0
    assert tight.gauge("kv_cache_usage_perc") == 0


@pytest.mark.parametrize("policy", ["sarathi", "mlfq"])
def test_swap_changes_no_token(policy: str, invariant: Driver, executables: str) -> None:
    """Six sequences in pages for a few of them: they go to the host and come back, bit for bit."""
    cases = prompts([150, 200, 180, 130, 170, 190], seed=7)
    params = {"max_tokens": 260, "ignore_eos": True, "temperature": 0.8, "seed": 5, "repetition_penalty": 1.1}

    def all_tokens(driver: Driver) -> list[list[int]]:
        for index, prompt in enumerate(cases):
            driver.submit(str(index), prompt, **params)
        answers = driver.run()
        return [answers[str(i), 0].tokens for i in range(len(cases))]

    tight = Driver(
        **SHAPE,
        compile_cache=executables,
        batch_invariant=True,
        enable_prefix_caching=False,
        kv_cache_memory=17 * PAGE_BYTES,
        swap_space=64 * PAGE_BYTES,
        scheduling_policy=policy,
        scheduling_params=["first_quantum_s=0.05", "starve_s=1"] if policy == "mlfq" else [],
    )
    assert all_tokens(tight) == all_tokens(invariant)
    counters = tight.counters()
    assert counters["num_preemptions"] > 2 and counters["swap_in_moves"] > 0, counters
    moved = (counters["swap_out_bytes"] + counters["swap_in_bytes"]) / PAGE_BYTES
    assert counters["swap_copies"] <= moved
    assert tight.gauge("kv_cache_usage_perc") == 0 and tight.gauge("swap_usage_perc") == 0


def test_speculation_changes_no_token(invariant: Driver, speculative: Driver) -> None:
    text = prompts([12], seed=8)[0] * 6
    cases = [text, prompts([90], seed=9)[0], text[:50]]

    def all_tokens(driver: Driver, **params: object) -> list[list[int]]:
        for index, prompt in enumerate(cases):
            driver.submit(str(index), prompt, max_tokens=100, ignore_eos=True, **params)
        answers = driver.run()
        return [answers[str(i), 0].tokens for i in range(len(cases))]

    assert all_tokens(speculative) == all_tokens(invariant)
    assert all_tokens(speculative, temperature=0.7, seed=2) == all_tokens(invariant, temperature=0.7, seed=2)
    assert 0 < speculative.counter("spec_decode_num_accepted_tokens")
    assert speculative.counter("spec_decode_num_accepted_tokens") <= speculative.counter("spec_decode_num_draft_tokens")
    assert speculative.gauge("kv_cache_usage_perc") == 0


def test_ends(driver: Driver) -> None:
    prompt = prompts([30], seed=10)[0]
    free = driver.one(prompt, max_tokens=20, ignore_eos=True).tokens
    stop = free[6]
    first = free.index(stop)
    stopped = driver.one(prompt, max_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    assert stopped.tokens == free[: first + 1] and stopped.finish is FinishReason.STOP
    later = driver.one(prompt, max_tokens=20, ignore_eos=True, stop_token_ids=[stop], min_tokens=first + 3)
    assert len(later.tokens) > first + 3 and stop not in later.tokens[: first + 3]
    assert driver.one(prompt, max_tokens=0).tokens == []
    longest = driver.one(prompts([1000], seed=11)[0], max_tokens=5000, ignore_eos=True)
    assert len(longest.tokens) == 24 and longest.finish is FinishReason.LENGTH


def test_masks_and_bias(driver: Driver) -> None:
    prompt = prompts([20], seed=12)[0]
    allowed = [100, 200, 300]
    assert set(driver.one(prompt, max_tokens=10, allowed_token_ids=allowed, ignore_eos=True).tokens) <= set(allowed)
    forced = driver.one(prompt, max_tokens=5, logit_bias={321: 100.0}, ignore_eos=True)
    assert forced.tokens == [321] * 5
    best = driver.one(prompt, max_tokens=1, ignore_eos=True).tokens[0]
    assert driver.one(prompt, max_tokens=1, banned_token_ids=[best], ignore_eos=True).tokens != [best]


def test_cancel_frees_pages_at_once(driver: Driver) -> None:
    driver.submit("gone", prompts([500], seed=13)[0], max_tokens=400, n=2, temperature=1.0, ignore_eos=True)
    for _ in range(12):
        driver.core.step()
    driver.inbox.put(Cancel(ids=("gone/0",)))
    driver.core.step()
    driver.inbox.put(Cancel(ids=("gone", "unknown")))
    driver.run()
    assert driver.gauge("kv_cache_usage_perc") == 0
    assert driver.gauge("num_requests_running") == 0


def test_one_bad_request_hurts_nobody(driver: Driver) -> None:
    good = prompts([40], seed=14)[0]
    expected = driver.one(good, max_tokens=6).tokens
    driver.submit("bad id", [1, 99999])
    driver.submit("empty", [])
    driver.submit("long", [5] * 2000)
    driver.submit("good", good, max_tokens=6)
    answers = driver.run()
    for name in ("bad id", "empty", "long"):
        assert answers[name, 0].finish is FinishReason.ERROR and answers[name, 0].error
    assert answers["good", 0].tokens == expected


def test_quiet_requests_get_one_delta(driver: Driver) -> None:
    driver.submit("quiet", prompts([10], seed=15)[0], max_tokens=9, ignore_eos=True, stream=False)
    answer = driver.run()["quiet", 0]
    assert answer.deltas == 1 and len(answer.tokens) == 9


def test_recorded_events_replay_to_the_same_plans(executables: str, tmp_path: Path) -> None:
    record = tmp_path / "record"
    recorded = Driver(**SHAPE, compile_cache=executables, record=str(record), kv_cache_memory=20 * PAGE_BYTES)
    for index, prompt in enumerate(prompts([200, 300, 200, 64, 500, 1], seed=16)):
        recorded.submit(str(index), prompt, max_tokens=90, n=1 + index % 2, temperature=1.0)
    recorded.run()
    rows, preemptions = recorded.counter("decode_rows"), recorded.counter("num_preemptions")
    recorded.core.close()
    assert sum(len(plan.decode) for plan in replay(record)) == rows > 100
    assert preemptions > 0


def test_nothing_was_compiled_outside_the_declared_set(driver: Driver, invariant: Driver, speculative: Driver) -> None:
    for each in (driver, invariant, speculative):
        assert each.counter("undeclared_compilations") == 0


def test_a_program_computes_only_what_its_next_turn_adds(invariant: Driver, executables: str) -> None:
    """Without prefix caching, page ends or not, with the model's answer or a golden one: the same tokens as afresh."""
    held = Driver(**SHAPE, compile_cache=executables, batch_invariant=True, enable_prefix_caching=False)
    params = {"max_tokens": 20, "ignore_eos": True, "temperature": 0.8, "seed": 5}
    (first, question) = prompts([150, 40], seed=9)
    said = held.one(first, program_id="p", **params).tokens
    for answer, cached in ((said, 169), (said[:5] + question[:3], 155)):
        prompt = [*first, *answer, *question]
        follow_up = held.one(prompt, program_id="p", **params)
        afresh = invariant.one(prompt, salt=f"afresh-{cached}", **params)
        assert follow_up.cached_tokens == cached
        assert follow_up.tokens == afresh.tokens
        held.one(first, program_id="p", **params)
    assert held.gauge("num_programs_pinned") == 1
    held.inbox.put(Control(verb="close_program", program=program_key("", "", "p")))
    assert held.gauge("num_programs_pinned") == 0
    assert held.gauge("kv_cache_usage_perc") == 0


def test_programs_of_other_salts_are_others(driver: Driver) -> None:
    prompt = prompts([30], seed=10)[0]
    said = driver.one(prompt, program_id="p", salt="a", max_tokens=4, ignore_eos=True).tokens
    assert driver.one([*prompt, *said, 5], program_id="p", salt="b", max_tokens=4).cached_tokens == 0
    assert driver.one([*prompt, *said, 5], program_id="p", salt="a", last_turn=True, max_tokens=4).cached_tokens == 33
