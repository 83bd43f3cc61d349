"""The GPU day's command where there is no GPU: `--smoke` runs every part of it, and without it nothing is claimed."""

from __future__ import annotations

from pathlib import Path

from tests.scripts.smoke import run

FORMATS = {"bf16", "int8", "fp8_e4m3", "kivi4", "hack2", "zeroc"}
"""Of the steps: one of each kind."""


def test_smoke_fills_every_table(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    ran = run("gpu_day.py", "--smoke", "--out", str(out), "--formats", *FORMATS)
    assert ran.returncode == 0, ran.stderr
    text = out.read_text()
    assert text == ran.stdout
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    checked = [row for row in rows if len(row) == 5 and row[4].strip() == "ok"]
    kinds = {(row[0].strip(), row[2].strip()) for row in checked}
    assert kinds == {(op, kind) for op in ("decode", "prefill") for kind in ("bf16", "int8", "hack2", "zeroc")}
    assert "WRONG" not in text
    assert sum(len(row) == 9 and row[0].strip() in ("decode", "prefill") for row in rows) == len(checked)
    assert sum(len(row) == 6 and row[5].strip() == "ok" for row in rows) == 2  # a whole prompt, and the end of one
    steps = {row[0].strip() for row in rows if len(row) == 5 and "%" in row[4]}
    assert steps == FORMATS


def test_parts_and_pages_can_be_chosen() -> None:
    ran = run("gpu_day.py", "--smoke", "--parts", "checks", "--pages", "hack4_p")
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[1] for line in ran.stdout.splitlines() if line.endswith("ok |")] == ["decode", "prefill"]
    assert "## Kernels" not in ran.stdout


def test_without_a_gpu_it_says_so() -> None:
    ran = run("gpu_day.py")
    assert ran.returncode == 2 and "--smoke" in ran.stderr
