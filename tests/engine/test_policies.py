"""Policies in the engine: whoever goes first, tokens are the same; BatchLLM computes what its tree says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jaxserve.scheduler import policy_names
from tests.engine.driver import Driver, close_all

PAGE_BYTES = 2 * 2 * 2 * 64 * 32 * 4
"""Layers, K and V, KV heads, tokens, head_dim, float32."""
SHAPE = {
    "kv_cache_dtype": "f32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "decode_buckets": [4],
    "tile_buckets": [2],
    "wait_for_buckets": True,
    "batch_invariant": True,
    "kv_cache_memory": 11 * PAGE_BYTES,
    "swap_space": 64 * PAGE_BYTES,
}
PARAMS = {"mlfq": ["first_quantum_s=0.005", "starve_s=0.05", "check_every=20"], "batchllm": ["gather_s=0"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=640,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def build(model: Path, executables: str, policy: str, **options: object) -> Driver:
    """With pages for two or three requests, a host that takes what they lose, and chunks of two tiles."""
    return Driver(
        model=str(model),
        compile_cache=executables,
        scheduling_policy=policy,
        scheduling_params=PARAMS.get(policy, []),
        **SHAPE | options,
    )


@pytest.fixture
def make(model: Path, executables: str) -> Iterator[Callable[..., Driver]]:
    yield functools.partial(build, model, executables)
    close_all()


def submit(driver: Driver, index: int) -> None:
    length = (150, 200, 60, 130, 170, 190, 90, 220)[index]
    prompt = np.random.default_rng(index).integers(4, 500, length).tolist()
    driver.submit(str(index), prompt, max_tokens=70 + 10 * index, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(model: Path, executables: str) -> list[list[int]]:
    """Each request alone."""
    driver, tokens = build(model, executables, "fcfs", enable_prefix_caching=False), []
    for index in range(8):
        submit(driver, index)
        tokens.append(driver.run()[str(index), 0].tokens)
    assert driver.counter("num_preemptions") == 0
    return tokens


@pytest.mark.parametrize("policy", [*policy_names(), "slora+mlfq", "prepacking+fcfs"])
def test_greedy_tokens_are_the_same_under_every_policy(
    policy: str, make: Callable[..., Driver], expected: list[list[int]]
) -> None:
    tight = make(policy, enable_prefix_caching=False)
    for index in range(8):
        submit(tight, index)
    answers = tight.run()
    assert [answers[str(index), 0].tokens for index in range(8)] == expected
    counters = tight.counters()
    assert counters["policy_errors"] == 0
    assert counters["num_preemptions"] > 0 or policy.startswith("slora"), counters
    assert tight.gauge("kv_cache_usage_perc") == 0 and tight.gauge("swap_usage_perc") == 0


def test_batchllm_prefills_what_its_tree_predicts(make: Callable[..., Driver]) -> None:
    """Ten shuffled groups whose prefixes do not fit into memory together: each shared page is computed once."""
    groups, members, prefix, own = 10, 4, 128, 40
    rng = np.random.default_rng(5)
    heads = [rng.integers(4, 500, prefix).tolist() for _ in range(groups)]
    prompts = [[*head, *rng.integers(4, 500, own).tolist()] for head in heads for _ in range(members)]
    prefilled = {}
    for policy in ("fcfs", "batchllm"):
        driver = make(policy)
        for index in np.random.default_rng(7).permutation(len(prompts)).tolist():
            driver.submit(str(index), prompts[index], max_tokens=3, ignore_eos=True)
        driver.run()
        prefilled[policy] = driver.counter("prefill_tokens")
    assert prefilled["batchllm"] == groups * (prefix + members * own)
    assert prefilled["fcfs"] > 1.5 * prefilled["batchllm"]
