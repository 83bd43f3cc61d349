"""Comparisons: paired differences, and whole runs of two configurations on the same items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxserve.cli import main
from jaxserve.eval.compare import read_contestants
from jaxserve.eval.options import EvalConfig
from jaxserve.eval.stats import mean_interval, paired_interval


def test_pairing_sees_a_difference_that_the_scores_alone_do_not_show() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(200)
    base, other = (hard > 0.5).astype(float), (hard > 0.58).astype(float)
    apart = [mean_interval(scores, range(200)) for scores in (base, other)]
    assert apart[0].low < apart[1].high
    delta = paired_interval(other, base, range(200))
    assert delta.high < 0 and delta.low < delta.mean < delta.high


def test_turns_of_one_document_are_not_independent() -> None:
    """Scores that agree within documents say as much as one item a document does."""
    scores = np.repeat(np.random.default_rng(0).integers(0, 2, 20), 10)
    by_document = mean_interval(scores, np.repeat(np.arange(20), 10).tolist())
    by_item = mean_interval(scores, range(200))
    assert by_document.high - by_document.low > 2 * (by_item.high - by_item.low)


def test_intervals_repeat_and_cover() -> None:
    assert mean_interval([0, 1, 1], "abc") == mean_interval([0, 1, 1], "abc")
    rng = np.random.default_rng(3)
    draws = [mean_interval(rng.random(60) < 0.7, range(60), seed) for seed in range(100)]
    assert sum(one.low <= 0.7 <= one.high for one in draws) >= 85
    with pytest.raises(ValueError, match="no scores"):
        mean_interval([], [])


def test_the_presets_can_be_compared() -> None:
    files = sorted((Path(__file__).parents[2] / "configs" / "eval").glob("*.yaml"))
    found = read_contestants(EvalConfig(), files)
    assert {"dense", "bf16"} <= set(found)
    assert len({config.engine for config in found.values()}) == len(files)


def test_two_configurations_on_the_same_items(
    engine_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name, dtype in (("dense", "f32"), ("half", "bf16")):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({**engine_options, "kv_cache_dtype": dtype}))
    asked = [
        "--task",
        "kv-recall",
        "perplexity",
        "--lengths",
        "256",
        "--mode",
        "multi-turn",
        "--items",
        "4",
        "--turns=2",
    ]
    asked += ["--window", "256", "--stride", "128", "--max-text-tokens", "600"]
    out = tmp_path / "out"
    command = ["eval", "--compare", *map(str, files), *asked, "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "half - dense" in printed and "KV bytes per token at 256" in printed
    found = json.loads((out / "comparison.json").read_text())
    memory = [found["results"][name]["cells"][0]["kv_bytes_per_token"] for name in ("dense", "half")]
    assert memory[0] == 2 * memory[1]
    [recall, text] = found["differences"]["half"]
    assert recall["task"] == "kv-recall" and recall["low"] <= recall["delta"] <= recall["high"]
    assert 0 < abs(text["delta"]) < 0.05
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "half.yaml").write_text("lengths: 512\n")
    assert main(command) == 2
    assert "lengths is not an engine option; it holds for all configurations" in capsys.readouterr().err
    assert main(["eval", "--compare", str(files[0])]) == 2
    assert "--compare needs at least two files" in capsys.readouterr().err
