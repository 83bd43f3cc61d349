"""The matrix products of every model. Dispatches on the weight's type; knows nothing of layers or devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.quant.formats import weight_format
from jaxserve.quant.qtensor import QTensor


@dataclass(frozen=True)
class LinearContext:
    """How products are computed; static for a compiled program.

    Attributes:
        invariant_rows: None, or the fixed number of rows of a product (batch-invariant mode). Rows are padded to a
            multiple of it and multiplied block by block, so the bits of a row do not depend on how many rows there are.
            Weights whose kernel gives each row bits of its own are multiplied with all rows at once all the same.
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
    y = weight_format(w.format).row_product(x, w) if isinstance(w, QTensor) else None
    if y is None:
        y = _in_blocks(lambda block: _product(block, w, ctx, out_dtype), x, ctx)
    else:
        y = y.astype(out_dtype)
    return y if bias is None else y + bias.astype(out_dtype)


def linear_heads(x: jax.Array, w: jax.Array, ctx: LinearContext = LinearContext()) -> jax.Array:  # noqa: B008  frozen
    """x [T, heads, n, in] times w [heads, in, out], a matrix for each head -> [T, heads, n, out] in the dtype of x.

    Sums are float32.
    """
    precision = ctx.precision if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def product(block: jax.Array) -> jax.Array:
        return jnp.einsum("thni,hio->thno", block, w, precision=precision, preferred_element_type=x.dtype)

    return _in_blocks(product, x, ctx)


def _in_blocks(product: Callable[[jax.Array], jax.Array], x: jax.Array, ctx: LinearContext) -> jax.Array:
    """`product` of x [T, ...], in blocks of the number of rows that the context fixes."""
    rows, count = ctx.invariant_rows, x.shape[0]
    if rows is None:
        return product(x)
    padded = jnp.pad(x, ((0, -count % rows), *[(0, 0)] * (x.ndim - 1)))
    y = jax.lax.map(product, padded.reshape(-1, rows, *x.shape[1:]))
    return y.reshape(padded.shape[0], *y.shape[2:])[:count]


def _product(x: jax.Array, w: jax.Array | QTensor, ctx: LinearContext, out_dtype: jnp.dtype) -> jax.Array:
    precision = ctx.precision if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    if isinstance(w, QTensor):
        return weight_format(w.format).product(x, w, precision).astype(out_dtype)
    return jnp.dot(x, w, precision=precision, preferred_element_type=out_dtype)
