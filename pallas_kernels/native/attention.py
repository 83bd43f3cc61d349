"""Paged attention of any few or many queries over dense pages on a CPU: the face of attention.c."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import Dense, HostDense, Layout
from pallas_kernels.merge import Attended
from pallas_kernels.native import build

_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint16": "BF16"}
"""What the floats of a pool are to the kernel; uint16 are the bits of bfloat16, see `layouts.HostDense`."""
_MAX_PAGE_TOKENS, _MAX_DIM, _LANES = 128, 256, 16


def attention_target(pool: Any, layout: Layout) -> str | None:
    """The custom call for pages of `layout`, or None where there is none: another layout, odd sizes, no compiler."""
    if type(layout) not in (Dense, HostDense):  # not what reads the same pool in another way
        return None
    _, _, page_tokens, head_dim, _ = layout.page_shape(pool)
    kind = _KINDS.get(pool.dtype.name)
    fits = all(size % _LANES == 0 for size in (page_tokens, head_dim))
    if kind is None or not fits or page_tokens > _MAX_PAGE_TOKENS or head_dim > _MAX_DIM:
        return None
    return build.target("paged_attention", "attention.c", {"KIND": kind, "DIM": head_dim})


def native_or(reference: Callable[..., Attended]) -> Callable[..., Attended]:
    """The op that `reference` defines, by the kernel where that reads the pages. The bits of a query then depend on it
    and on its pages alone."""

    def op(
        q: jax.Array, positions: jax.Array, pool: Any, layer: int | jax.Array, tables: jax.Array, **options: Any
    ) -> Attended:
        target = attention_target(pool, options["layout"])
        if target is None:
            return reference(q, positions, pool, layer, tables, **options)
        return _call(target, q, positions, pool, layer, tables, **options)

    return op


def _call(
    target: str,
    q: jax.Array,
    positions: jax.Array,
    pool: jax.Array,
    layer: int | jax.Array,
    tables: jax.Array,
    *,
    counts: jax.Array,
    places: jax.Array | None = None,
    scale: float,
    window: int | None,
    softcap: float | None,
    layout: Layout,
) -> Attended:
    rows, q_tokens, heads, head_dim = q.shape
    flat = jax.ShapeDtypeStruct((rows, q_tokens, heads), jnp.float32)
    call = jax.ffi.ffi_call(target, (jax.ShapeDtypeStruct((*flat.shape, head_dim), jnp.float32), flat, flat))
    nowhere = jnp.zeros((rows, 0), jnp.int32)
    operands = (positions, counts, tables, nowhere if places is None else places, jnp.asarray(layer))
    o, m, l = call(  # noqa: E741
        q.astype(jnp.float32),
        *(x.astype(jnp.int32) for x in operands),
        pool,
        scale=np.float64(scale),
        softcap=np.float64(softcap or 0),
        window=np.int64(window or 0),
    )
    return Attended(o, m, l)
