"""Shape checks that the paged ops share. They run while tracing, so a mistake costs no step."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.backends import runs_kernels
from pallas_kernels.layouts import KernelLayout, Layout


def check_paged(
    op: str, q: jax.Array, positions: jax.Array, pool: Any, tables: jax.Array, layout: Layout, backend: str
) -> None:
    """ValueError, naming `op` and the shapes, if the arguments of a paged attention op do not fit together."""
    if q.ndim != 4:
        raise ValueError(f"{op}: q must be [rows, q_tokens, heads, head_dim], not {q.shape}.")
    rows, _, heads, head_dim = q.shape
    _, kv_heads, _, pool_head_dim, _ = layout.page_shape(pool)
    if positions.shape != (rows,):
        raise ValueError(f"{op}: positions must be [{rows}] like the rows of q, not {positions.shape}.")
    if tables.ndim != 2 or tables.shape[0] != rows:
        raise ValueError(f"{op}: tables must be [{rows}, max_pages], not {tables.shape}.")
    if head_dim != pool_head_dim:
        raise ValueError(f"{op}: q has head_dim {head_dim}, the pool {pool_head_dim}.")
    if heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads do not divide into {kv_heads} KV heads.")
    if runs_kernels(backend) and not isinstance(layout, KernelLayout):
        raise ValueError(f"{op}: backend {backend} cannot read pages laid out as {layout}; take one for kernels.")
