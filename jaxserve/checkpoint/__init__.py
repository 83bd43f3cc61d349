"""Checkpoints: Hugging Face folders and Orbax folders to and from parameter trees. Knows nothing of serving."""

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
