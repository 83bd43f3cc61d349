"""Attention of decode rows over paged KV. Knows no model, no scheduler, no KV write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backends import resolve
from pallas_kernels.checks import check_paged
from pallas_kernels.layouts import Dense, Layout
from pallas_kernels.merge import Attended
from pallas_kernels.native.attention import native_or
from pallas_kernels.paged_decode import reference, triton


def _mosaic(*args: Any, **options: Any) -> Attended:
    # Imported where it runs: the lowering's modules take 17 MiB and a fifth of a second, and only Hopper needs them.
    from pallas_kernels.paged_decode import mosaic

    return mosaic.paged_decode(*args, **options)


_OPS: dict[str, Callable[..., Attended]] = {
    "reference": reference.paged_decode,
    "tiled": reference.tiled,
    "native": native_or(reference.paged_decode),
    "invariant": native_or(reference.tiled),
    "triton": triton.paged_decode,
    "mosaic": _mosaic,
    "cudnn": triton.paged_decode,
}


def paged_decode(
    q: jax.Array,
    positions: jax.Array,
    pool: Any,
    layer: int | jax.Array,
    tables: jax.Array,
    *,
    scale: float,
    counts: jax.Array | None = None,
    places: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    layout: Layout = Dense(),  # noqa: B008  (a frozen value)
    backend: str | None = None,
) -> Attended:
    """Causal attention of decode rows over the pages of their tables, their own tokens included (write, then attend).

    q: [rows, q_tokens, heads, head_dim], a few new tokens per row: 1, or the verification width of speculation.
    positions: int32 [rows], of each row's first query; -1 marks a padding row, which sees nothing.
    counts: int32 [rows]; queries from counts[row] on see nothing. None: all q_tokens queries are real.
    pool: what `layout` reads; dense: [pages, layers, 2, kv_heads, page_tokens, head_dim]. `layer`: index into it.
    tables: int32 [rows, max_pages]; entry i holds positions [i * page_tokens, (i + 1) * page_tokens). An entry outside
        [0, pages) is absent: its keys are not seen.
    places: int32 [rows, max_pages]; entry i of a row holds the page at places[row, i] instead, so that a table can be a
        short list of pages from anywhere in the sequence.
    window: a query at p sees (p - window, p]; None sees all. softcap: scores become softcap * tanh(score / softcap).
    backend: see `pallas_kernels.backends`; None takes the platform's.

    Returns (o, m, l), float32 [rows, q_tokens, heads(, value_dim)], see `pallas_kernels.merge`. Raises ValueError for
    shapes that do not fit together and for a layout that the backend cannot read.
    """
    backend = resolve(backend)
    check_paged("paged_decode", q, positions, pool, tables, layout, backend)
    if counts is None:
        counts = jnp.full_like(positions, q.shape[1])
    op = _OPS[backend]
    return op(
        q,
        positions,
        pool,
        layer,
        tables,
        counts=counts,
        places=places,
        scale=scale,
        window=window,
        softcap=softcap,
        layout=layout,
    )
