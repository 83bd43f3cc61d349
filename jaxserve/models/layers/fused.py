"""Column order of fused projections. Shared by the modules that multiply and the name maps that read checkpoints.

Columns are grouped so that a contiguous share of them is a whole share of the work: sharding the fused axis over 2, 4
or 8 devices needs no reordering, and a converted checkpoint does not depend on the degree.
"""

from __future__ import annotations

import math

from jaxserve.models.config import DecoderConfig

MLP_BLOCKS = 16
"""Upper bound of the tensor-parallel degree that the gate/up order supports."""

BLOCK_COLUMNS = 32
"""Of what a block is a multiple where that can be: kernels of CPUs take so many columns at once."""


def qkv_widths(config: DecoderConfig) -> tuple[int, int, int]:
    """Columns of q, k and v inside the block of one KV head; there are `kv_heads` blocks."""
    return config.group * config.head_dim, config.head_dim, config.head_dim


def mlp_blocks(config: DecoderConfig) -> int:
    """Blocks of the gate/up projection: each is `intermediate / blocks` gate columns, then as many up columns."""
    columns = BLOCK_COLUMNS if config.intermediate % BLOCK_COLUMNS == 0 else 1
    return math.gcd(config.intermediate // columns, MLP_BLOCKS)
