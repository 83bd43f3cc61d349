"""Every preset in configs/ is one that an engine takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.config import EngineConfig, ServeConfig, build, read_yaml

PRESETS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset(path: Path):
    options = read_yaml(path)
    assert options
    assert build(EngineConfig, options) == build(ServeConfig, options).engine != EngineConfig()
