"""Weights on a CPU: the same numbers, in the order in which its kernels read them. Nothing is lost.

Numbers that bfloat16 holds exactly, as those of most checkpoints, are held as its bits in uint16: half the memory to
read, the same float32 products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.quant.qtensor import QTensor
from pallas_kernels.native.products import (
    PANEL,
    deinterleave,
    interleave,
    panel_product,
    table_product,
)


@dataclass(frozen=True)
class Panels:
    """A matrix with PANEL columns side by side, so that a product reads one stream: codes [out / PANEL, in, PANEL]."""

    name: ClassVar[str] = "panels"

    def quantize(self, weight: Any) -> QTensor:
        xp = jnp if isinstance(weight, jax.Array) else np
        rows, columns = weight.shape
        padded = xp.pad(weight.astype(xp.float32), ((0, 0), (0, -columns % PANEL)))
        codes = interleave(_narrow(padded.reshape(rows, -1, PANEL).swapaxes(0, 1)))
        return QTensor(codes, None, self.name, columns)

    def dequantize(self, weight: QTensor) -> Any:
        codes = _widen(deinterleave(weight.codes))
        return codes.swapaxes(0, 1).reshape(codes.shape[1], -1)[:, : weight.columns]

    def product(self, x: jax.Array, weight: QTensor, precision: jax.lax.Precision) -> jax.Array:
        return jnp.dot(x, self.dequantize(weight).astype(x.dtype), precision=precision)

    def row_product(self, x: jax.Array, weight: QTensor) -> jax.Array | None:
        y = panel_product(x, weight.codes) if x.dtype == jnp.float32 else None
        return None if y is None else y[:, : weight.columns]

    def axes(self, weight: QTensor, axes: tuple[str | None, ...]) -> QTensor:
        return replace(weight, codes=(axes[1], axes[0], None))


@dataclass(frozen=True)
class Table:
    """The transpose of a matrix, by rows: codes [out, in]. What a tied embedding is to the projection to logits."""

    name: ClassVar[str] = "table"

    def quantize(self, weight: Any) -> QTensor:
        xp = jnp if isinstance(weight, jax.Array) else np
        return QTensor(_narrow(weight.astype(xp.float32).T), None, self.name)

    def dequantize(self, weight: QTensor) -> Any:
        return _widen(weight.codes).T

    def product(self, x: jax.Array, weight: QTensor, precision: jax.lax.Precision) -> jax.Array:
        return jnp.dot(x, self.dequantize(weight).astype(x.dtype), precision=precision)

    def row_product(self, x: jax.Array, weight: QTensor) -> jax.Array | None:
        return table_product(x, weight.codes) if x.dtype == jnp.float32 else None

    def axes(self, weight: QTensor, axes: tuple[str | None, ...]) -> QTensor:
        return replace(weight, codes=axes[::-1])


def take(table: jax.Array | QTensor, ids: jax.Array) -> jax.Array:
    """Rows `ids` [T] of a table [rows, columns], or of a matrix in the `table` format -> [T, columns]."""
    if isinstance(table, QTensor):
        return _widen(jnp.take(table.codes, ids, axis=0, mode="clip"))
    return jnp.take(table, ids, axis=0, mode="clip")


def _narrow(codes: Any) -> Any:
    """As the bits of bfloat16 where that changes no number. Which numbers they are is known on the host only."""
    if isinstance(codes, jax.Array):
        return codes
    codes = np.ascontiguousarray(codes)
    bits = codes.view(np.uint32)
    return codes if (bits & 0xFFFF).any() else (bits >> 16).astype(np.uint16)


def _widen(codes: Any) -> Any:
    """Codes as float32."""
    if codes.dtype != np.uint16:
        return codes
    xp = jnp if isinstance(codes, jax.Array) else np
    return (codes.astype(xp.uint32) << 16).view(xp.float32)
