"""The bundled model, as package data."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Folder of the bundled model, in Hugging Face layout."""
    return Path(__file__).parent / "lookup"
