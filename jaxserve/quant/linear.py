"""The one matrix product of every model. Dispatches on the weight's type; knows nothing of layers or devices."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.quant.formats import weight_format
from jaxserve.quant.qtensor import QTensor


@dataclass(frozen=True)
class LinearContext:
    """How products are computed; static for a compiled program.

    Attributes:
        invariant_rows: None, or the fixed number of rows of every product (batch-invariant mode). Rows are padded to a
            multiple of it and multiplied block by block, so the bits of a row do not depend on how many rows there are.
        precision: of products whose operands are float32. HIGHEST is real float32: the default of GPUs is TF32.
    """

    invariant_rows: int | None = None
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST


def linear(
    x: jax.Array,
    w: jax.Array | QTensor,
    bias: jax.Array | None = None,
    ctx: LinearContext = LinearContext(),  # noqa: B008  frozen
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """x [T, in] times w [in, out], plus bias [out] -> [T, out].

    Sums are float32 whatever the operands are. The result has `out_dtype`, by default the dtype of x.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    rows = ctx.invariant_rows
    if rows is None:
        y = _product(x, w, ctx, out_dtype)
    else:
        count = x.shape[0]
        padded = jnp.pad(x, ((0, -count % rows), (0, 0)))
        blocks = padded.reshape(-1, rows, x.shape[1])

        y = jax.lax.map(lambda block: _product(block, w, ctx, out_dtype), blocks)
        y = y.reshape(padded.shape[0], -1)[:count]
    return y if bias is None else y + bias.astype(out_dtype)


def _product(x: jax.Array, w: jax.Array | QTensor, ctx: LinearContext, out_dtype: jnp.dtype) -> jax.Array:
    precision = ctx.precision if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    if isinstance(w, QTensor):
        return weight_format(w.format).product(x, w, precision).astype(out_dtype)
    return jnp.dot(x, w, precision=precision, preferred_element_type=out_dtype)
