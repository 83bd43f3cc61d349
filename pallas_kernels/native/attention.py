"""Paged attention on a CPU: the faces of attention.c, for any few or many queries, and of tiles.c, for prefill tiles of
pages of floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import (
    Dense,
    EightBitRows,
    FloatRows,
    HackFolded,
    HackPartitioned,
    HostDense,
    HostEightBitRows,
    HostFloatRows,
    KernelLayout,
    Kivi,
    Layout,
)
from pallas_kernels.merge import Attended
from pallas_kernels.native import build

_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint16": "BF16"}
"""What the floats of a pool are to the kernel; uint16 are the bits of bfloat16, see `layouts.HostDense`."""
_MAX_PAGE_TOKENS, _MAX_DIM, _LANES, _WIDTH = 128, 256, 16, 32


def _floats(layout: Any, pool: Any) -> dict[str, Any] | None:
    kind = _KINDS.get(layout.arrays(pool)[0].dtype.name)
    return {"PAGES": "dense", "KIND": kind} if kind else None


def _eight_bit(layout: EightBitRows, pool: Any) -> dict[str, Any]:
    return {"PAGES": "eight_bit", "CODE": type(layout.code).__name__.upper()}


def _packed(layout: Kivi | HackFolded | HackPartitioned, pool: Any) -> dict[str, Any]:
    page_tokens = layout.page_shape(pool).page_tokens
    return {"BITS": layout.bits, "GROUP": layout.group, "PAGE_TOKENS": page_tokens}


_PAGES: Mapping[type, Callable[[Any, Any], dict[str, Any] | None]] = {
    Dense: _floats,
    HostDense: _floats,
    FloatRows: _floats,
    HostFloatRows: _floats,
    EightBitRows: _eight_bit,
    HostEightBitRows: _eight_bit,
    Kivi: lambda layout, pool: {"PAGES": "kivi"} | _packed(layout, pool),
    HackFolded: lambda layout, pool: {"PAGES": "hack", "FORM": "FOLDED"} | _packed(layout, pool),
    HackPartitioned: lambda layout, pool: {"PAGES": "hack", "FORM": "PARTITIONED"} | _packed(layout, pool),
}
"""For each layout that the kernel reads, what its header is compiled with. By type, not by kind of: a subclass may read
the same pool in another way."""


def attention_target(pool: Any, layout: Layout) -> str | None:
    """The custom call for pages of `layout`, or None where there is none: another layout, odd sizes, no compiler."""
    kind = _PAGES.get(type(layout))
    defines = kind(layout, pool) if kind else None
    _, _, page_tokens, head_dim, value_dim = layout.page_shape(pool)
    fits = all(size % _LANES == 0 for size in (page_tokens, head_dim, value_dim))
    if defines is None or not fits or page_tokens > _MAX_PAGE_TOKENS or max(head_dim, value_dim) > _MAX_DIM:
        return None
    sizes = {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
    return build.target("paged_attention", "attention.c", defines | sizes)


def tiles_target(pool: Any, layout: Layout) -> str | None:
    """As `attention_target`, of the kernel for prefill tiles. It is faster, but a query that comes in a tile has other
    bits than by decode. Pages that it does not take are left to attention.c."""
    kind = _floats(layout, pool) if type(layout) in (Dense, HostDense) else None
    other = attention_target(pool, layout)
    _, _, page_tokens, head_dim, value_dim = layout.page_shape(pool)
    if kind is None or other is None or page_tokens % _WIDTH or value_dim % _WIDTH:
        return other
    defines = {"KIND": kind["KIND"], "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "PAGE_TOKENS": page_tokens}
    return build.target("tiled_attention", "tiles.c", defines)


def native_or(
    reference: Callable[..., Attended], find: Callable[[Any, Layout], str | None] = attention_target
) -> Callable[..., Attended]:
    """The op that `reference` defines, by the kernel that `find` names for the pages. Within the op the bits of a query
    then depend on it and on its pages alone."""

    def op(
        q: jax.Array, positions: jax.Array, pool: Any, layer: int | jax.Array, tables: jax.Array, **options: Any
    ) -> Attended:
        target = find(pool, options["layout"])
        if target is None:
            return reference(q, positions, pool, layer, tables, **options)
        return _call(target, q, positions, pool, layer, tables, **options)

    return op


def _call(
    target: str,
    q: jax.Array,
    positions: jax.Array,
    pool: Any,
    layer: int | jax.Array,
    tables: jax.Array,
    *,
    counts: jax.Array,
    places: jax.Array | None = None,
    scale: float,
    window: int | None,
    softcap: float | None,
    layout: KernelLayout,
) -> Attended:
    rows, q_tokens, heads, _ = q.shape
    flat = jax.ShapeDtypeStruct((rows, q_tokens, heads), jnp.float32)
    value_dim = layout.page_shape(pool).value_dim
    call = jax.ffi.ffi_call(target, (jax.ShapeDtypeStruct((*flat.shape, value_dim), jnp.float32), flat, flat))
    nowhere = jnp.zeros((rows, 0), jnp.int32)
    operands = (positions, counts, tables, nowhere if places is None else places, jnp.asarray(layer))
    o, m, l = call(  # noqa: E741
        q.astype(jnp.float32),
        *(x.astype(jnp.int32) for x in operands),
        *layout.arrays(pool),
        scale=np.float64(scale),
        softcap=np.float64(softcap or 0),
        window=np.int64(window or 0),
    )
    return Attended(o, m, l)
