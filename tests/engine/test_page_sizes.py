"""Pages, tiles and partitions of 32 and 128 tokens: the answers of 64, and the same bits however KV came about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.shapes import EngineShape
from jaxserve.kv import formats
from jaxserve.types import PAGE_SIZES, Control, ExportPrefix, ImportPrefix, KVGroup
from tests.engine import tiny
from tests.engine.driver import Driver, alone, answers, prompts, same
from tests.engine.invariance import chunked_is_whole, decoded_is_prefilled_is_crowded

CASES = [1, 32, 33, 128, 129, 330]
OTHERS = [("f32", 32), ("hack4", 128)]
"""What the equalities are checked with."""
SEALED = {"hack4": {"quant_group": 32}}
"""Options of formats: scales of other groups than elsewhere, too."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the format that they are served with. One has a layer that sees 100 tokens, and one that sees all."""
    torch.manual_seed(0)
    layers = {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}
    gemma = Gemma3TextConfig(**tiny.SIZES | layers, query_pre_attn_scalar=64)
    folders = {}
    for name, model in {"f32": LlamaForCausalLM(LlamaConfig(**tiny.SIZES)), "hack4": Gemma3ForCausalLM(gemma)}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def memory(name: str, size: int) -> int:
    """For one sequence of the maximum length and half of another, in two layers."""
    group = KVGroup(layers=(0,), kv_heads=2, head_dim=64, page_tokens=size)
    open, *sealed = (kind.bytes for kind in formats.get(name, **SEALED.get(name, {})).kinds(group))
    return 12 * open + 9 * sealed[0] if sealed else 3 * (640 // size) * open


@pytest.fixture(scope="module")
def make(models: dict[str, Path], executables: str):
    """Engines by format, page size and options; each is made once."""
    made: dict[str, Driver] = {}

    def driver(name: str, size: int, **options: object) -> Driver:
        key = repr((name, size, sorted(options.items())))
        if key not in made:
            own = {"kv_cache_dtype": name, "block_size": size, "kv_cache_memory": memory(name, size)}
            # Spare memory becomes 16-bit pages where there are two classes, so that sealed ones run out.
            own |= {"kv_expected_len": size, "model": str(models[name]), "compile_cache": executables}
            own |= {f"kv_{option}": value for option, value in SEALED.get(name, {}).items()}
            own |= {"max_num_seqs": 16, "decode_buckets": [16], "tile_buckets": [256 // size]}
            own |= {"kv_transfer": (name, size) in OTHERS}
            made[key] = Driver(**tiny.SHAPE | own | options)
        return made[key]

    return driver


def test_answers_do_not_depend_on_the_page(make) -> None:
    """Dense pages in float32: tokens are the same, log-probs up to the order of sums."""
    cases = prompts(CASES, seed=1)
    got = {size: answers(make("f32", size), cases, prompt_logprobs=0, max_tokens=150) for size in PAGE_SIZES}
    for size in PAGE_SIZES:
        assert {group.page_tokens for group in make("f32", size).core.ready.page_classes} == {size}
        for mine, theirs in zip(got[size], got[64], strict=True):
            assert mine.tokens == theirs.tokens
            for ours, others in ((mine.logprobs, theirs.logprobs), (mine.prompt_logprobs, theirs.prompt_logprobs)):
                pairs = [(a.logprobs[0], b.logprobs[0]) for a, b in zip(ours, others, strict=True) if a and b]
                np.testing.assert_allclose(*np.array(pairs).reshape(-1, 2).T, atol=1e-4)


@pytest.mark.parametrize(("name", "size"), OTHERS)
def test_decoded_is_prefilled_is_chunked_is_crowded(make, name: str, size: int) -> None:
    cases = prompts(CASES, seed=1)
    decoded_is_prefilled_is_crowded(make(name, size), cases)
    chunked_is_whole(make(name, size, max_num_batched_tokens=size, tile_buckets=[1]), make(name, size), cases)


@pytest.mark.parametrize(("name", "size"), OTHERS)
def test_prefix_hits_and_preemption_change_no_bit(make, name: str, size: int) -> None:
    driver = make(name, size)
    (case,) = prompts([300], seed=3)
    first, again = (answers(driver, [case], salt="hit")[0] for _ in range(2))
    assert (first.cached_tokens, again.cached_tokens) == (0, 300 // size * size)
    same([again], [first])
    cases = prompts([350, 400, 380, 330], seed=5)
    params = {"temperature": 0.8, "seed": 5, "max_tokens": 150}
    undisturbed = alone(driver, cases, **params)
    before = driver.counter("num_preemptions")
    same(answers(driver, cases, salt="together", **params), undisturbed)
    assert driver.counter("num_preemptions") > before
    assert driver.gauge("kv_cache_usage_perc") == 0


@pytest.mark.parametrize(("name", "size"), OTHERS)
def test_exported_pages_come_back(make, name: str, size: int) -> None:
    driver, (prompt,) = make(name, size), prompts([300], seed=9)
    (first,) = answers(driver, [prompt], salt="export")
    ask = ExportPrefix(token=1, tokens=tuple(prompt), salt="export")
    prefix = driver.ask(ask)
    assert (prefix.count, prefix.error) == (300 // size * size, None)
    driver.inbox.put(Control(verb="reset_prefix_cache"))
    driver.run()
    bring = ImportPrefix(token=2, tokens=tuple(prompt), pages=prefix.pages, salt="export")
    assert driver.ask(bring).count == prefix.count
    (second,) = answers(driver, [prompt], salt="export")
    assert second.cached_tokens == prefix.count
    same([second], [first])


def test_nothing_was_compiled_outside_the_declared_set(make) -> None:
    for name, size in OTHERS:
        assert make(name, size).counter("undeclared_compilations") == 0


def test_sizes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="--block-size 48 is not one of 32, 64, 128"):
        EngineConfig.of(block_size=48)
    narrow = EngineConfig.of(block_size=128, max_num_batched_tokens=100)
    with pytest.raises(ConfigError, match="--max-num-batched-tokens 100 must be at least --block-size 128"):
        EngineShape.of(narrow, max_len=640, on_gpu=False)
