"""What all tests share. jax must see the CPU, whatever GPU wheels are installed for compile-only targets."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import hypothesis
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def executables(pytestconfig: pytest.Config) -> str:
    """One folder of compiled programs for the whole run, and for the next one."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("executables")
    folder.chmod(0o700)
    return str(folder)
