"""Quantized KV in the engine: the same tokens however a sequence's KV came about, in batch-invariant mode.

KV_FORMATS=all runs every format. Here stand those that test_kv_groups.py has in no group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.kv_formats import attention_backend
from jaxserve.kv import formats
from jaxserve.types import KVGroup
from tests.engine.driver import Driver, prompts
from tests.engine.tiny import SHAPE
from tests.kv_formats import chosen

SAMPLED = {"ignore_eos": True, "temperature": 0.8, "top_p": 0.95, "seed": 5, "logprobs": 2}
GROUP = KVGroup(layers=(0, 1), kv_heads=2, head_dim=64)
"""Of the tiny Llama."""


def memory(name: str) -> int:
    """A sequence of the maximum length and a half. Two classes: sealed pages for one such sequence, 16-bit pages for
    all requests of a test, so that sealed ones run out."""
    open, *sealed = (kind.bytes for kind in formats.get(name).kinds(GROUP))
    return 10 * open + 9 * sealed[0] if sealed else 15 * open


@pytest.fixture(scope="module", params=chosen("fp8_e4m3", "kivi4", "hack8_p"))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def driver(name: str, tiny_models: dict[str, Path], executables: str) -> Driver:
    # An expected length of one page: spare memory becomes 16-bit pages.
    options = {"kv_cache_dtype": name, "kv_cache_memory": memory(name), "kv_expected_len": 64}
    return Driver(**SHAPE, **options, model=str(tiny_models["llama"]), compile_cache=executables)


def test_chunks_and_crowds_change_no_bit(driver: Driver) -> None:
    """Alone a prompt is prefilled in two full steps; in a crowd it shares the budget and decodes beside others."""
    prompt = prompts([230], seed=4)[0]
    alone = driver.one(prompt, max_tokens=30, **SAMPLED)
    for index, other in enumerate(prompts([9, 64, 133, 200], seed=5)):
        driver.submit(f"other-{index}", other, max_tokens=60, ignore_eos=True, temperature=1.0, seed=index)
    driver.submit("mine", prompt, salt="not the cached pages", max_tokens=30, **SAMPLED)
    crowd = driver.run()["mine", 0]
    assert crowd.tokens == alone.tokens and crowd.logprobs == alone.logprobs


def test_decoded_pages_are_prefilled_pages(driver: Driver) -> None:
    """A page that decoding filled, hit by a later prompt, or computed again by prefill: the same bits."""
    prompt = prompts([60], seed=2)[0]
    answer = driver.one(prompt, max_tokens=80, ignore_eos=True)
    follow_up = [*prompt, *answer.tokens, 5]
    hit = driver.one(follow_up, max_tokens=20, **SAMPLED)
    driver.submit("again", follow_up, salt="not the cached pages", max_tokens=20, **SAMPLED)
    again = driver.run()["again", 0]
    assert (hit.cached_tokens, again.cached_tokens) == (128, 0)
    assert hit.tokens == again.tokens and hit.logprobs == again.logprobs


def test_choices_are_those_of_single_requests(driver: Driver) -> None:
    """A fork shares full pages and copies the last one: what it then draws is what it drew before."""
    prompt = prompts([100], seed=6)[0]
    runs = []
    for salt in ("a", "b"):
        driver.submit("n", prompt, n=3, salt=salt, max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
        answers = driver.run()
        runs.append([answers["n", choice].tokens for choice in range(3)])
    assert runs[0] == runs[1] and len({tuple(tokens) for tokens in runs[0]}) == 3


def test_preemption_changes_no_token(driver: Driver) -> None:
    """The pool holds one sequence of the maximum length and a half: alone nothing is preempted, together much is."""
    cases = prompts([200, 260, 230, 180], seed=7)
    alone = [driver.one(prompt, max_tokens=100, **SAMPLED).tokens for prompt in cases]
    before = driver.counter("num_preemptions")
    for index, prompt in enumerate(cases):
        driver.submit(str(index), prompt, salt="not the cached pages", max_tokens=100, **SAMPLED)
    together = driver.run()
    assert [together[str(index), 0].tokens for index in range(len(cases))] == alone
    assert driver.counter("num_preemptions") > before
    assert driver.gauge("kv_cache_usage_perc") == 0


def test_nothing_was_compiled_outside_the_declared_set(driver: Driver) -> None:
    assert driver.counter("undeclared_compilations") == 0


@pytest.mark.parametrize(
    ("backend", "invariant", "words"),
    [
        ("mosaic", False, "needs a GPU"),
        ("cudnn", False, "needs a GPU"),
        ("triton", True, "needs a GPU"),
        ("reference", True, "leave out"),
    ],
)
def test_backends_that_cannot_be_had_are_refused(backend: str, invariant: bool, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Driver(**SHAPE | {"batch_invariant": invariant}, attention_backend=backend)


def test_the_kernels_of_cpus_are_refused_on_a_gpu() -> None:
    config = EngineConfig(runtime=replace(EngineConfig().runtime, attention_backend="native"))
    with pytest.raises(ConfigError, match="--attention-backend native is for CPUs"):
        attention_backend(config, on_gpu=True)
    assert attention_backend(config, on_gpu=False) == "native"
