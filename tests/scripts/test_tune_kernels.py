"""The tuner where there is no GPU: `--smoke` fills its table, and without it nothing is claimed."""

from __future__ import annotations

from tests.scripts.smoke import run


def test_smoke_tries_the_sizes_of_both_kernels() -> None:
    ran = run("tune_kernels.py", "--smoke", "--pages", "bf16")
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["decode", "prefill"]
    assert all("warps" in row[6] and float(row[8]) >= 1 for row in rows)


def test_without_a_gpu_it_says_so() -> None:
    ran = run("tune_kernels.py")
    assert ran.returncode == 2 and "--smoke" in ran.stderr
