"""The library over the bundled model: one engine for the sync tests, one for the async ones."""

from __future__ import annotations

from typing import Any

import pytest

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "decode_buckets": [8],
    "tile_buckets": [4],
    "wait_for_buckets": True,
}


@pytest.fixture(scope="module")
def engine_options(executables: str) -> dict[str, Any]:
    return {**OPTIONS, "compile_cache": executables}
