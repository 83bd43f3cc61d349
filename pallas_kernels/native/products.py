"""Products on a CPU: the faces of panels.c, table.c and gated.c. All give a row bits that depend on that row alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import build

PANEL = 32
"""Columns of a weight in one panel."""
LANES = 16
"""What the columns of a table, and those of a gate, are a multiple of."""

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
    return _rows("panel_product", "panels.c", _kind(panels), panels.shape[0] * PANEL, x, panels)


def table_product(x: jax.Array, table: jax.Array) -> jax.Array | None:
    """float32 x [rows, in] times the rows of `table` [out, in], float32 or bfloat16 as uint16 -> float32 [rows, out].
    None where there is no compiler and for `in` that is no multiple of LANES."""
    return None if x.shape[1] % LANES else _rows("table_product", "table.c", _kind(table), table.shape[0], x, table)


def gated_silu(both: jax.Array) -> jax.Array | None:
    """silu(gate) * up of float32 [rows, 2 * n], gate columns before up columns -> float32 [rows, n]. None where there
    is no compiler and for n that is no multiple of LANES."""
    columns = both.shape[1]
    return None if columns % (2 * LANES) else _rows("gated_silu", "gated.c", {}, columns // 2, both)


def _kind(weight: jax.Array) -> dict[str, str]:
    return {"KIND": _KINDS[weight.dtype.name]}


def _rows(symbol: str, source: str, defines: dict[str, str], columns: int, *operands: jax.Array) -> jax.Array | None:
    """float32 [rows of the first operand, columns] by the kernel; None where there is no compiler."""
    target = build.target(symbol, source, defines)
    if target is None:
        return None
    result = jax.ShapeDtypeStruct((operands[0].shape[0], columns), jnp.float32)
    rows: jax.Array = jax.ffi.ffi_call(target, result)(*operands)
    return rows
