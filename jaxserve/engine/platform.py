"""Chooses jax's platform before jax is imported. Imports no jax itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def select_platform(device: str) -> None:
    """`device`: auto | cpu | cuda. Without an NVIDIA driver jax is told to use the CPU at once, instead of trying CUDA
    wheels that happen to be installed. An explicit JAX_PLATFORMS is left alone, and so is a jax already imported."""
    if "jax" in sys.modules or "JAX_PLATFORMS" in os.environ:
        return
    has_driver = Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists() or Path("/dev/dxg").exists()
    if device == "cpu" or (device == "auto" and not has_driver):
        os.environ["JAX_PLATFORMS"] = "cpu"
