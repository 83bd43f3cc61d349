"""Imports follow docs/architecture.md: an arrow never points up, scheduling is pure, the API process has no jax."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxserve

ROOT = Path(jaxserve.__file__).parent

LEAVES = {"types", "config"}
LEVELS = [
    {"cli"},
    {"server", "batch", "cluster"},
    {"api", "engine", "sim", "eval", "aot", "calibrate", "openai"},
    {"text", "models", "sampling", "speculative", "checkpoint", "bundled"},
    {"kv", "quant", "parallel"},
]
LEVEL = {room: depth for depth, rooms in enumerate(LEVELS) for room in rooms}
WITHIN_LEVEL = {
    ("api", "engine"),
    ("eval", "engine"),
    ("aot", "engine"),
    ("eval", "api"),
    ("batch", "server"),
    ("sampling", "speculative"),
    ("speculative", "sampling"),
    ("checkpoint", "models"),
    ("checkpoint", "bundled"),
    ("sim", "engine"),
}
"""Arrows inside a level. Sampling and speculation are two halves of the head; of the engine, the simulator sees the
shapes, so that it prices the buckets that the runner takes, and the pace, so that policies learn what they would
there."""

PURE = ("jax", "numpy", "flax", "asyncio", "time", "random", "threading", "socket")


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "jaxserve" and len(parts) > 1 else None


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.parent != ROOT or p.stem not in {"__init__", "__main__"}]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_never_point_up(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        target = room_of(name)
        if target is None or target in LEAVES or target == room or target.startswith("_"):
            continue
        if room in LEAVES:
            pytest.fail(f"{room} is a leaf and must not import {name}")
        if target == "scheduler":
            assert room in {"engine", "sim"}, f"{room} imports {name}"
        elif room == "scheduler":
            pytest.fail(f"scheduler imports {name}")
        else:
            down = LEVEL[target] > LEVEL[room] or (room, target) in WITHIN_LEVEL
            assert down, f"{room} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "sim").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_simulator_sees_only_shapes_and_pace_of_the_engine(path: Path) -> None:
    seen = {name for name in imports(path) if room_of(name) == "engine"}
    assert all(name.startswith(("jaxserve.engine.shapes.", "jaxserve.engine.pace.")) for name in seen)


@pytest.mark.parametrize("path", sorted((ROOT / "scheduler").rglob("*.py")), ids=lambda p: p.stem)
def test_scheduler_is_pure(path: Path) -> None:
    impure = {name for name in imports(path) if name.split(".")[0] in PURE}
    assert not impure


def test_kernels_know_nothing_of_the_package() -> None:
    kernels = ROOT.parent / "pallas_kernels"
    for path in kernels.rglob("*.py"):
        assert not {name for name in imports(path) if name.startswith("jaxserve")}, path


@pytest.mark.parametrize(
    "module",
    [
        "jaxserve.server.main",
        "jaxserve.engine.process",
        "jaxserve.api",
        "jaxserve.text",
        "jaxserve.cli",
        "jaxserve.eval.compare",
        "jaxserve.cli.simulate",
        "jaxserve.sim.sweep",
    ],
)
def test_api_process_has_no_jax(module: str) -> None:
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
