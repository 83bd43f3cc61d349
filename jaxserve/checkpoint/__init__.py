"""Checkpoints: Hugging Face folders and Orbax folders to and from parameter trees. Knows nothing of serving.

Names are imported when they are first used: front ends read `generation.py` and `source.py` and have no jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.checkpoint.errors import CheckpointError
    from jaxserve.checkpoint.export import export_hf
    from jaxserve.checkpoint.generation import GenerationDefaults, read_generation_config
    from jaxserve.checkpoint.load import load_model, read_config
    from jaxserve.checkpoint.orbax_store import save_orbax
    from jaxserve.checkpoint.source import resolve

__all__ = [
    "CheckpointError",
    "GenerationDefaults",
    "export_hf",
    "load_model",
    "read_config",
    "read_generation_config",
    "resolve",
    "save_orbax",
]

_HOMES = {
    "CheckpointError": "errors",
    "GenerationDefaults": "generation",
    "export_hf": "export",
    "load_model": "load",
    "read_config": "load",
    "read_generation_config": "generation",
    "resolve": "source",
    "save_orbax": "orbax_store",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
