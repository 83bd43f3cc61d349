"""An engine with two page classes: dense results if sealing loses nothing, the same bits however KV came about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.config import ConfigError
from jaxserve.scheduler import replay
from jaxserve.types import SeqId
from tests.engine.driver import Driver, alone, answers, prompts, same
from tests.engine.invariance import (
    a_program_keeps_two_pages,
    chunked_is_whole,
    decoded_is_prefilled_is_crowded,
    preempted_is_undisturbed,
    speculated_is_plain,
)
from tests.engine.tiny import SHAPE
from tests.kv import layouts  # noqa: F401  registers its formats

OPEN_BYTES, SEALED_BYTES = 2 * 2 * 2 * 64 * 64 * 2, 2 * 2 * 2 * (64 + 2 * 4) * 64
"""Of a page of test-rounded with two layers, K and V, two heads: bfloat16; a byte a value and two floats a channel."""
RULES = {"llama": {}, "gemma": {"kv_sink_pages": 0, "kv_residual_pages": 2}}
"""How engines by each model read sealed pages, unless a test says otherwise."""


@pytest.fixture(scope="module")
def make(tiny_models: dict[str, Path], executables: str):
    """Engines by model, format and options; each is made once."""
    made: dict[str, Driver] = {}

    def driver(model: str = "llama", kv_format: str | None = "test-rounded", **options: object) -> Driver:
        key = repr((model, kv_format, sorted(options.items())))
        if key not in made:
            own = {"model": str(tiny_models[model]), "compile_cache": executables}
            rule = RULES[model] if kv_format else {}
            made[key] = Driver(kv_format, **SHAPE | own | rule | options)
        return made[key]

    return driver


CASES = [1, 63, 64, 65, 128, 200, 300, 520]


@pytest.mark.parametrize("model", RULES)
def test_sealing_without_loss_gives_the_tokens_of_dense_kv(make, model: str) -> None:
    dense = answers(make(model, None, kv_cache_dtype="f32"), prompts(CASES))
    plain = answers(make(model, "test-plain"), prompts(CASES))
    for a, b in zip(dense, plain, strict=True):
        assert a.tokens == b.tokens
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            # Two partial results are merged where dense attention makes one walk.
            np.testing.assert_allclose(x.logprobs[0], y.logprobs[0], atol=1e-4)


@pytest.mark.parametrize("model", RULES)
def test_decoded_is_prefilled_is_crowded(make, model: str) -> None:
    """Alone and in a crowd prompts are cut into chunks of one to four tiles, at other places."""
    decoded_is_prefilled_is_crowded(make(model), prompts(CASES, seed=1), cuts=(10, 64, 70))


def test_other_programs_and_chunks_change_no_bit(make) -> None:
    narrow = make("gemma", max_num_batched_tokens=64, tile_buckets=[1])
    chunked_is_whole(narrow, make("gemma"), prompts(CASES, seed=1))


def test_sealing_is_seen(make) -> None:
    """The tests above would pass if nothing were ever sealed."""
    case = prompts([300], seed=2)
    rounded = alone(make(), case, max_tokens=1)[0].logprobs[0].logprobs
    dense = alone(make(kv_format=None, kv_cache_dtype="f32"), case, max_tokens=1)[0].logprobs[0].logprobs
    assert np.abs(np.subtract(rounded, dense)).max() > 1e-3


@pytest.mark.parametrize("model", RULES)
def test_prefix_hits_change_no_bit(make, model: str) -> None:
    driver = make(model)
    case = prompts([300], seed=3)
    first, again = answers(driver, case, salt="hit")[0], answers(driver, case, salt="hit")[0]
    assert (first.cached_tokens, again.cached_tokens) == (0, 256)
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


SEALED_PAGES_RUN_OUT = {"kv_cache_memory": 9 * OPEN_BYTES + 14 * SEALED_BYTES, "kv_expected_len": 64}
OPEN_PAGES_RUN_OUT = {"kv_cache_memory": 20 * OPEN_BYTES + 14 * SEALED_BYTES, "kv_expected_len": 640}


@pytest.mark.parametrize(
    ("lengths", "memory"),
    [
        ((150, 200, 180, 130, 170, 190), SEALED_PAGES_RUN_OUT),
        ((20, 40, 60, 30, 50, 10, 25, 45), OPEN_PAGES_RUN_OUT),
    ],
    ids=["sealed pages run out", "16-bit pages run out"],
)
def test_preemption_changes_no_bit(make, lengths: tuple[int, ...], memory: dict[str, int]) -> None:
    tight = make(enable_prefix_caching=False, **memory)
    preempted_is_undisturbed(tight, make(), lengths)


def test_speculation_changes_no_token(make) -> None:
    speculative = make("gemma", speculative_method="ngram", num_speculative_tokens=3)
    for params in ({}, {"temperature": 0.7, "seed": 2}):
        speculated_is_plain(speculative, make("gemma"), **params)


def test_programs_keep_whole_pages(make) -> None:
    a_program_keeps_two_pages(make(enable_prefix_caching=False))


def test_prefill_exact_is_served(make) -> None:
    exact = make(kv_format="test-rounded-f32", prefill_exact=True, batch_invariant=False)
    dense = make(kv_format=None, kv_cache_dtype="f32")
    case = prompts([200], seed=9)
    # One chunk of four tiles: nothing is read sealed before the first decode row.
    a, b = (alone(driver, case, max_tokens=1)[0].logprobs[0] for driver in (exact, dense))
    assert a.ids == b.ids
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_the_record_replays(make, tmp_path: Path) -> None:
    record = tmp_path / "record"
    driver = make(record=str(record), **SEALED_PAGES_RUN_OUT)
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


def test_options_of_sealed_pages_need_a_format_that_has_them(tiny_models: dict[str, Path]) -> None:
    for option, name in (("kv_sink_pages", "--kv-sink-pages"), ("kv_residual_pages", "--kv-residual-pages")):
        with pytest.raises(ConfigError, match=f"f32 has no {name}"):
            Driver(model=str(tiny_models["llama"]), kv_cache_dtype="f32", **{option: 1})
    with pytest.raises(ConfigError, match="f32 has no --prefill-exact"):
        Driver(model=str(tiny_models["llama"]), kv_cache_dtype="f32", prefill_exact=True)
    with pytest.raises(ConfigError, match="--kv-expected-len 5000"):
        Driver(model=str(tiny_models["llama"]), kv_expected_len=5000)


def test_nothing_was_compiled_outside_the_declared_set(make) -> None:
    for options in ({}, {"speculative_method": "ngram", "num_speculative_tokens": 3}):
        assert make("gemma", **options).counter("undeclared_compilations") == 0
