"""Sizes with which kernels are launched. Chosen from what the compiler says for H200 (registers, spills,
docs/measurements/h200-compile.md), not from timings: `scripts/tune_kernels.py` measures them where a GPU is. Knows no
kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

PROGRAMS = 264
"""Programs that fill a GPU: two for each of the 132 multiprocessors of an H100 or H200."""


class Launch(NamedTuple):
    """`block`: query vectors of a program."""

    block: int
    num_warps: int
    num_stages: int


def decode_splits(rows: int, kv_heads: int) -> int:
    """Shares that a row's pages are cut into, so that small batches fill the GPU: a power of two, at most 16."""
    splits = 1
    while splits < 16 and rows * kv_heads * splits < PROGRAMS:
        splits *= 2
    return splits


def decode_launch(vectors: int) -> Launch:
    """For a program of all `vectors` that share a row's KV head."""
    return Launch(vectors, 4, 3)


def prefill_launch(q_tokens: int, head_dim: int, dtype: jnp.dtype, arrays: Sequence[jax.Array]) -> Launch:
    """For a tile of `q_tokens` queries in `dtype` over a pool of `arrays`."""
    block = min(q_tokens, 64)
    if any(array.dtype == jnp.uint8 for array in arrays):
        # Packed codes. Scaling and rounding a tile's rows takes registers: four warps spill at head_dim 128, and so do
        # eight with pages loaded ahead. Pages of 128 tokens leave room for the rows of one MMA.
        return Launch(16, 4, 1) if q_tokens > 64 else Launch(block, 4 if head_dim <= 64 else 8, 1)
    if jnp.dtype(dtype).itemsize > 2:
        # float32 products run on the scalar units, where a whole tile would not fit into the registers.
        return Launch(min(block, 16), 8, 2)
    if q_tokens > 64 and any(array.dtype.itemsize == 1 for array in arrays):
        return Launch(32, 4, 2)
    return Launch(block, 4, 2)
