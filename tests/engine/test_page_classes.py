"""An engine with two page classes: dense results if sealing loses nothing, the same bits however KV came about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from jaxserve.config import ConfigError
from jaxserve.scheduler import replay
from jaxserve.types import SeqId
from tests.engine import tiny
from tests.engine.driver import Driver, alone, answers, prompts, same
from tests.engine.invariance import (
    a_program_keeps_two_pages,
    chunked_is_whole,
    decoded_is_prefilled_is_crowded,
    preempted_is_undisturbed,
    speculated_is_plain,
)
from tests.kv import layouts  # noqa: F401  registers its formats

SIZES = tiny.SIZES | {"head_dim": 32}
SHAPE = tiny.SHAPE | {"max_num_seqs": 16, "decode_buckets": [16]}
OPEN_BYTES, SEALED_BYTES = 2 * 2 * 2 * 64 * 32 * 2, 2 * 2 * 2 * (64 + 2 * 4) * 32
"""Of a page of test-rounded with two layers, K and V, two heads: bfloat16; a byte a value and two floats a channel."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama, and a Gemma whose first layer sees 100 tokens."""
    torch.manual_seed(0)
    gemma = SIZES | {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "gemma": Gemma3ForCausalLM(Gemma3TextConfig(**gemma, query_pre_attn_scalar=32)),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def make(models: dict[str, Path], executables: str):
    """Engines by model, format and options; each is made once."""
    made: dict[str, Driver] = {}

    def driver(model: str = "llama", kv_format: str | None = "test-rounded", **options: object) -> Driver:
        key = repr((model, kv_format, sorted(options.items())))
        if key not in made:
            shape = {**SHAPE, "model": str(models[model]), "compile_cache": executables, **options}
            made[key] = Driver(kv_format, **shape)
        return made[key]

    return driver


CASES = [1, 63, 64, 65, 128, 200, 300, 520]


@pytest.mark.parametrize("model", ["llama", "gemma"])
@pytest.mark.parametrize(("sinks", "residual"), [(1, 1), (0, 2)])
def test_sealing_without_loss_gives_the_tokens_of_dense_kv(make, model: str, sinks: int, residual: int) -> None:
    dense = answers(make(model, None, kv_cache_dtype="f32"), prompts(CASES))
    plain = answers(make(model, "test-plain", kv_sink_pages=sinks, kv_residual_pages=residual), prompts(CASES))
    for a, b in zip(dense, plain, strict=True):
        assert a.tokens == b.tokens
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            # Two partial results are merged where dense attention makes one walk.
            np.testing.assert_allclose(x.logprobs[0], y.logprobs[0], atol=1e-4)


@pytest.mark.parametrize("model", ["llama", "gemma"])
def test_decoded_is_prefilled_is_chunked_is_crowded(make, model: str) -> None:
    cases = prompts(CASES, seed=1)
    decoded_is_prefilled_is_crowded(make(model), cases, cuts=(10, 64, 70))
    chunked_is_whole(make(model, max_num_batched_tokens=64, tile_buckets=[1]), make(model), cases)


def test_sealing_is_seen(make) -> None:
    """The tests above would pass if nothing were ever sealed."""
    case = prompts([300], seed=2)
    rounded = alone(make(), case, max_tokens=1)[0].logprobs[0].logprobs
    dense = alone(make(kv_format=None, kv_cache_dtype="f32"), case, max_tokens=1)[0].logprobs[0].logprobs
    assert np.abs(np.subtract(rounded, dense)).max() > 1e-3


@pytest.mark.parametrize(("residual", "cached"), [(1, 256), (2, 256)])
def test_prefix_hits_change_no_bit(make, residual: int, cached: int) -> None:
    driver = make(kv_residual_pages=residual)
    case = prompts([300], seed=3)
    first, again = answers(driver, case, salt="hit")[0], answers(driver, case, salt="hit")[0]
    assert (first.cached_tokens, again.cached_tokens) == (0, cached)
    same([again], [first])
    turn = [*case[0], *first.tokens, 7, 8, 9]
    hit = answers(driver, [turn], salt="hit", max_tokens=20)[0]
    assert hit.cached_tokens == 320
    same([hit], answers(driver, [turn], salt="fresh", max_tokens=20))


@pytest.mark.parametrize("caching", [True, False])
def test_choices_share_sealed_pages(make, caching: bool) -> None:
    driver = make(enable_prefix_caching=caching)
    for length in (64, 65, 200):
        prompt = prompts([length], seed=4)[0]
        params = {"temperature": 1.0, "seed": 3, "ignore_eos": True, "max_tokens": 70}
        driver.submit("n", prompt, n=8, **params)
        choices = driver.run()
        assert len({tuple(choices["n", i].tokens) for i in range(8)}) == 8
        driver.submit("n", prompt, n=8, salt="again", **params)
        again = driver.run()
        assert [again["n", i].tokens for i in range(8)] == [choices["n", i].tokens for i in range(8)]


@pytest.mark.parametrize(
    ("lengths", "open_pages", "expected"),
    [((150, 200, 180, 130, 170, 190), 9, 64), ((20, 40, 60, 30, 50, 10, 25, 45), 20, 640)],
    ids=["sealed pages run out", "16-bit pages run out"],
)
def test_preemption_changes_no_bit(make, lengths: tuple[int, ...], open_pages: int, expected: int) -> None:
    memory = open_pages * OPEN_BYTES + 14 * SEALED_BYTES
    tight = make(kv_cache_memory=memory, kv_expected_len=expected, enable_prefix_caching=False)
    preempted_is_undisturbed(tight, make(), lengths)


@pytest.mark.parametrize("model", ["llama", "gemma"])
def test_speculation_changes_no_token(make, model: str) -> None:
    speculative = make(model, speculative_method="ngram", num_speculative_tokens=3)
    for params in ({}, {"temperature": 0.7, "seed": 2}):
        speculated_is_plain(speculative, make(model), **params)


def test_programs_keep_whole_pages(make) -> None:
    a_program_keeps_two_pages(make(enable_prefix_caching=False))


def test_prefill_exact_is_served(make) -> None:
    exact = make(prefill_exact=True)
    dense = make(kv_format=None, kv_cache_dtype="bf16")
    case = prompts([200], seed=9)
    # One chunk of four tiles: nothing is read sealed before the first decode row.
    a, b = (alone(driver, case, max_tokens=1)[0].logprobs[0] for driver in (exact, dense))
    assert a.ids == b.ids
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_the_record_replays(make, tmp_path: Path) -> None:
    record = tmp_path / "record"
    driver = make(record=str(record), kv_cache_memory=12 * OPEN_BYTES + 20 * SEALED_BYTES)
    for index, prompt in enumerate(prompts([200, 300, 64, 100, 1], seed=10)):
        driver.submit(str(index), prompt, max_tokens=90, n=1 + index % 2, temperature=1.0)
    driver.run()
    driver.core.close()
    plans = list(replay(record))
    assert sum(len(plan.pages.seals) for plan in plans) > 5
    sealed: set[tuple[SeqId, int, int]] = set()
    for plan in plans:
        seqs = {work.slot: work.seq for work in plan.decode}
        for seal in plan.pages.seals:  # one token a row: lengths are known, so no page is sealed twice
            key = (seqs[seal.slot], seal.group, seal.index)
            assert key not in sealed or plan.preempted
            sealed.add(key)


def test_options_of_sealed_pages_need_a_format_that_has_them(models: dict[str, Path]) -> None:
    for option, name in (("kv_sink_pages", "sink_pages"), ("kv_residual_pages", "residual_pages")):
        with pytest.raises(ConfigError, match=f"f32 knows no {name}"):
            Driver(model=str(models["llama"]), kv_cache_dtype="f32", **{option: 1})
    with pytest.raises(ConfigError, match="prefill_exact"):
        Driver(model=str(models["llama"]), kv_cache_dtype="f32", prefill_exact=True)
    with pytest.raises(ConfigError, match="--kv-expected-len 5000"):
        Driver(model=str(models["llama"]), kv_expected_len=5000)


def test_nothing_was_compiled_outside_the_declared_set(make) -> None:
    for options in ({}, {"speculative_method": "ngram", "num_speculative_tokens": 3}):
        assert make(**options).counter("undeclared_compilations") == 0
