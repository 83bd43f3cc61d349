"""Products on a CPU: the faces of panels.c, table.c and gated.c. All give a row bits that depend on that row alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.native import build

PANEL = 32
"""Columns of a weight in one panel."""
LANES = 16
"""What the columns of a table, and those of a gate, are a multiple of."""

_KINDS = {"float32": "F32", "uint16": "BF16"}


def interleave(codes: Any) -> Any:
    """Panels of 16 bits [..., PANEL] in the order of their columns -> in the order 0, 16, 1, 17, ..., which the kernel
    widens with one operation a vector."""
    return codes.reshape(*codes.shape[:-1], 2, PANEL // 2).swapaxes(-1, -2).reshape(codes.shape)


def deinterleave(codes: Any) -> Any:
    """What `interleave` was given."""
    return codes.reshape(*codes.shape[:-1], PANEL // 2, 2).swapaxes(-1, -2).reshape(codes.shape)


def panel_product(x: jax.Array, panels: jax.Array) -> jax.Array | None:
    """float32 x [rows, in] times `panels` [out / PANEL, in, PANEL], float32, or interleaved bfloat16 as uint16 ->
    float32 [rows, out]. None where there is no compiler."""
    return _product("panel_product", "panels.c", x, panels, panels.shape[0] * PANEL)


def table_product(x: jax.Array, table: jax.Array) -> jax.Array | None:
    """float32 x [rows, in] times the rows of `table` [out, in], float32 or bfloat16 as uint16 -> float32 [rows, out].
    None where there is no compiler and for `in` that is no multiple of LANES."""
    return None if x.shape[1] % LANES else _product("table_product", "table.c", x, table, table.shape[0])


def gated_silu(both: jax.Array) -> jax.Array | None:
    """silu(gate) * up of float32 [rows, 2 * n], gate columns before up columns -> float32 [rows, n]. None where there
    is no compiler and for n that is no multiple of LANES."""
    rows, columns = both.shape
    target = None if columns % (2 * LANES) else build.target("gated_silu", "gated.c", {})
    if target is None:
        return None
    product: jax.Array = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((rows, columns // 2), jnp.float32))(both)
    return product


def _product(symbol: str, source: str, x: jax.Array, weight: jax.Array, out: int) -> jax.Array | None:
    target = build.target(symbol, source, {"KIND": _KINDS[weight.dtype.name]})
    if target is None:
        return None
    product: jax.Array = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((x.shape[0], out), jnp.float32))(x, weight)
    return product
