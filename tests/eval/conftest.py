"""The harness over the bundled model, with few programs."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def engine_options(executables: str) -> dict[str, Any]:
    return {
        "compile_cache": executables,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "decode_buckets": [8],
        "tile_buckets": [4],
        "max_model_len": 1024,
        "wait_for_buckets": True,
    }
