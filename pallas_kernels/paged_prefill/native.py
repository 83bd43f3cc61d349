"""Paged prefill attention on a CPU: the C kernel where it reads the pages, the jnp reference elsewhere."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.layouts import Layout
from pallas_kernels.merge import Attended
from pallas_kernels.native.attention import attention_target, paged_attention
from pallas_kernels.paged_prefill import reference


def paged_prefill(
    q: jax.Array,
    positions: jax.Array,
    pool: Any,
    layer: int | jax.Array,
    tables: jax.Array,
    *,
    layout: Layout,
    **options: Any,
) -> Attended:
    """See `api.paged_prefill`."""
    target = attention_target(pool, layout)
    if target is None:
        return reference.paged_prefill(q, positions, pool, layer, tables, layout=layout, **options)
    return paged_attention(target, q, positions, pool, layer, tables, layout=layout, **options)
