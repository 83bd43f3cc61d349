"""Agreement: its measures on small examples, and the engine against transformers in float32."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cli import main
from jaxserve.config import build
from jaxserve.eval.agreement import Reading, check_logprobs_close, divergence, match_length
from jaxserve.eval.options import EvalConfig
from jaxserve.eval.readings import agree
from jaxserve.types import TokenLogprobs


def entry(row: np.ndarray, token: int, top: int) -> TokenLogprobs:
    best = np.argsort(-row)[:top]
    return TokenLogprobs(ids=(token, *map(int, best)), logprobs=tuple(float(row[i]) for i in (token, *best)), rank=1)


def distribution(seed: int, sharpness: float, size: int = 50) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=size) * sharpness
    return logits - np.log(np.exp(logits).sum())


@given(st.integers(0, 1000), st.floats(0.1, 5), st.integers(1, 50))
def test_divergence_is_a_lower_bound_and_exact_over_all_tokens(seed: int, sharpness: float, top: int) -> None:
    p, q = distribution(seed, sharpness), distribution(seed + 1, sharpness)
    true = float((np.exp(p) * (p - q)).sum())
    assert -1e-9 <= divergence(entry(p, 0, top), entry(q, 0, top)) <= true + 1e-6
    assert divergence(entry(p, 0, 50), entry(q, 0, 50)) == pytest.approx(true, abs=1e-6)
    assert divergence(entry(p, 0, top), entry(p, 0, top)) == 0


def reading(tokens: list[int], best: list[tuple[int, ...]]) -> Reading:
    entries = (
        TokenLogprobs(ids=(t, *b), logprobs=(0.0,) * (1 + len(b)), rank=1) for t, b in zip(tokens, best, strict=True)
    )
    return Reading((), tuple(tokens), tuple(entries))


def test_tokens_may_differ_only_among_the_best_of_both() -> None:
    a = reading([1, 2, 3], [(1, 9), (2, 5), (3, 4)])
    assert match_length(a.tokens, (1, 2, 4)) == 2
    assert check_logprobs_close(a, a, 2) is None
    near = reading([1, 5, 7], [(1, 9), (5, 2), (7, 8)])
    assert check_logprobs_close(a, near, 2) is None
    far = reading([1, 6, 3], [(1, 9), (6, 2), (3, 4)])
    assert "token 1: the second side's 6 is not among" in str(check_logprobs_close(a, far, 2))


def test_the_dense_engine_equals_transformers_in_float32(engine_options: dict[str, Any]) -> None:
    options = {**engine_options, "kv_cache_dtype": "f32", "window": 96, "items": 4}
    found = agree(build(EvalConfig, options), "transformers")
    assert found.close == found.prompts == 4
    assert found.match_length == found.generated == 48
    assert found.top1 == 1.0 and found.topk > 0.995
    assert found.logprob_max < 1e-3 and found.kl_max < 1e-5 and not math.isnan(found.kl_mean)


def test_one_configuration_against_another(
    engine_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    mine.write_text(yaml.safe_dump({**engine_options, "kv_cache_dtype": "bf16"}))
    other.write_text("kv_cache_dtype: f32\n")
    command = ["eval", "--config", str(mine), "--agree-with", str(other), "--window", "64", "--items", "3"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "check_logprobs_close" in capsys.readouterr().out
    found = json.loads((tmp_path / "agreement.json").read_text())
    assert 0 < found["kl_mean"] < 0.01 and 1e-4 < found["logprob_max"] < 0.5
    assert main([*command, "--window", "900"]) == 2
    assert "do not fit into this model's context of 1024" in capsys.readouterr().err
