"""Products on a CPU: the faces of panels.c and table.c. Both give a row bits that depend on that row alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import build

PANEL = 32
"""Columns of a weight in one panel."""
LANES = 16
"""What the columns of a table are a multiple of."""

_KINDS = {"float32": "F32", "uint16": "BF16"}


def interleave(codes: Any) -> Any:
    """Panels [..., PANEL] in the order of their columns -> as the kernel wants them: columns of 16 bits in the order
    0, 16, 1, 17, ..., which it widens with one operation a vector."""
    if codes.dtype != np.uint16:
        return codes
    return codes.reshape(*codes.shape[:-1], 2, PANEL // 2).swapaxes(-1, -2).reshape(codes.shape)


def deinterleave(codes: Any) -> Any:
    """What `interleave` was given."""
    if codes.dtype != np.uint16:
        return codes
    return codes.reshape(*codes.shape[:-1], PANEL // 2, 2).swapaxes(-1, -2).reshape(codes.shape)


def panel_product(x: jax.Array, panels: jax.Array) -> jax.Array | None:
    """float32 x [rows, in] times `panels` [out / PANEL, in, PANEL], float32, or interleaved bfloat16 as uint16 ->
    float32 [rows, out]. None where there is no compiler."""
    return _rows("panel_product", "panels.c", panels.shape[0] * PANEL, x, panels)


def table_product(x: jax.Array, table: jax.Array) -> jax.Array | None:
    """float32 x [rows, in] times the rows of `table` [out, in], float32 or bfloat16 as uint16 -> float32 [rows, out].
    None where there is no compiler and for `in` that is no multiple of LANES."""
    return None if x.shape[1] % LANES else _rows("table_product", "table.c", table.shape[0], x, table)


def kind(weight: jax.Array) -> dict[str, str]:
    """What a kernel is compiled with to read such a weight."""
    return {"KIND": _KINDS[weight.dtype.name]}


def _rows(symbol: str, source: str, columns: int, x: jax.Array, weight: jax.Array) -> jax.Array | None:
    """float32 [rows of x, columns] by the kernel; None where there is no compiler."""
    target = build.target(symbol, source, kind(weight))
    if target is None:
        return None
    rows: jax.Array = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((x.shape[0], columns), jnp.float32))(x, weight)
    return rows
