"""Whole runs on the bundled model: right answers, the same bytes again, going on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli import main
from jaxserve.config import ConfigError, build
from jaxserve.eval.options import EvalConfig
from jaxserve.eval.report import summary, tables
from jaxserve.eval.rows import Row
from jaxserve.eval.run import Result, evaluate


def run(engine: dict[str, Any], **options: Any) -> Result:
    chosen = {"task": ["kv-recall"], "lengths": [256], "items": 6, "turns": 3, **options}
    return evaluate(build(EvalConfig, {**engine, **chosen}), progress=False)


def rows_of(result: Result) -> list[Row]:
    return [row for rows in result.rows.values() for row in rows]


def test_the_bundled_model_recalls_and_reuse_is_counted(engine_options: dict[str, Any], tmp_path: Path) -> None:
    out = str(tmp_path / "first")
    result = run(engine_options, task=["kv-recall", "two-hop"], out=out)
    found = {(c["task"], c["mode"]): c for c in summary(result)["cells"]}
    assert min(cell["score"] for cell in found.values()) >= 0.8
    assert found["kv-recall", "single"]["tokens_reused"] == 0
    # Two documents, asked three times each: two of three contexts are found in the cache, but for their last pages.
    for mode in ("multi-turn", "multi-request"):
        cell = found["kv-recall", mode]
        assert cell["tokens_reused"] > 0.4 * (cell["tokens_prefilled"] + cell["tokens_reused"])
    text = tables(result)
    assert "kv-recall" in text and "tokens prefilled" in text and "80-100 %" in text

    again = str(tmp_path / "second")
    run(engine_options, task=["kv-recall", "two-hop"], out=again)
    first, second = ((Path(folder) / "results.jsonl").read_bytes() for folder in (out, again))
    assert first == second, "two runs of one configuration differ"


def test_turns_of_a_program_find_what_was_held_for_it(engine_options: dict[str, Any]) -> None:
    options = {"mode": ["multi-turn", "multi-request"]}
    by_program, by_prefix = (rows_of(run(engine_options, **options, reuse=reuse)) for reuse in ("program", "prefix"))
    assert all((row.cached_tokens >= 192) == (row.turn > 0) for row in by_program if row.mode == "multi-turn")
    assert not any(row.cached_tokens for row in by_program if row.mode == "multi-request")
    assert any(row.cached_tokens for row in by_prefix if row.mode == "multi-request")
    assert [row.output for row in by_program] == [row.output for row in by_prefix]


def test_an_interrupted_run_goes_on(engine_options: dict[str, Any], tmp_path: Path) -> None:
    run(engine_options, out=str(tmp_path))
    file = tmp_path / "results.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    kept = run(engine_options, out=str(tmp_path))
    assert file.read_bytes() == whole
    assert [row.mode for row in rows_of(kept)] == ["single"] * 6 + ["multi-turn"] * 6 + ["multi-request"] * 6
    with pytest.raises(ConfigError, match="another configuration .task_seed was 0, and is 1 now"):
        run(engine_options, out=str(tmp_path), task_seed=1)


def test_batch_invariant_runs_agree_across_batch_shapes(engine_options: dict[str, Any]) -> None:
    """Other widths, budgets and arrivals: the same tokens with the same bits of their log-probs."""
    wide = {**engine_options, "batch_invariant": True}
    narrow = {**wide, "max_num_seqs": 2, "decode_buckets": [2], "max_num_batched_tokens": 64, "tile_buckets": [1]}
    options = {"mode": ["single", "multi-turn"], "task": ["variable-tracking"]}
    one, other = (
        [(row.item, row.token_ids, row.logprob) for row in rows_of(run(engine, **options))] for engine in (wide, narrow)
    )
    assert one == other


def test_what_does_not_fit_is_one_clear_error(
    engine_options: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in engine_options.items() if isinstance(value, str)]
    sizes = ["--max-num-seqs=8", "--max-num-batched-tokens=256", "--decode-buckets=8", "--tile-buckets=4"]
    code = main(["eval", *flags, *sizes, "--max-model-len=1024", "--lengths", "4096", "--task", "needle"])
    assert code == 2
    assert "needle needs sequences of 4096 tokens, and this model's context is 1024" in capsys.readouterr().err
    assert main(["eval", "--task", "needel"]) == 2
    assert "--task 'needel' is not one of kv-recall" in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_json(
    engine_options: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text(json.dumps(engine_options))
    out = tmp_path / "out"
    asked = ["--task", "kv-recall,needle", "--lengths", "256", "--mode", "single", "--items", "4", "--turns", "2"]
    assert main(["eval", "--config", str(config), *asked, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "kv-recall     256" in printed and "needle        256" in printed
    cells = json.loads((out / "summary.json").read_text())["cells"]
    assert [cell["items"] for cell in cells] == [4, 4]
    assert all(cell["low"] <= cell["score"] <= cell["high"] for cell in cells)
