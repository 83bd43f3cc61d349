"""Runs a script of the project as users do, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.cases import QUICKLY

ROOT = Path(__file__).parents[2]


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """`script`: its name in scripts/. What it compiles is compiled quickly."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = " ".join(f"--{flag}={value}".lower() for flag, value in QUICKLY.items())
    command = [sys.executable, str(ROOT / "scripts" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
