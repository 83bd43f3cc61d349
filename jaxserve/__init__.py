"""LLM inference in JAX: `LLM` and `AsyncLLM` for programs, `jaxserve serve` for the rest of the world.

Names are imported when they are first used: `import jaxserve` alone takes no time and imports no jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.api import LLM, AsyncLLM
    from jaxserve.config import EngineConfig
    from jaxserve.types import CachedPrefix, CompletionOutput, RequestOutput, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CachedPrefix",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "LLM": "jaxserve.api",
    "AsyncLLM": "jaxserve.api",
    "EngineConfig": "jaxserve.config",
    "CachedPrefix": "jaxserve.types",
    "CompletionOutput": "jaxserve.types",
    "RequestOutput": "jaxserve.types",
    "SamplingParams": "jaxserve.types",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
