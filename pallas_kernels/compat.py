"""The one place that knows how jax versions from 0.10.2 to 0.11.x differ in Pallas.

`pallas_call` without compiler parameters means Mosaic GPU on 0.10 and Triton on 0.11, so they are always given here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in a kernel, accumulated in float32. Operands of one dtype, every dimension at least 16. float32 operands
    are multiplied as float32, not TF32."""
    return pltriton.dot(a, b, precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def triton_call(
    kernel: Callable[..., None],
    *operands: jax.Array,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec | None],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Any:
    """`pl.pallas_call` through the Triton lowering. A None in `in_specs` hands the kernel the whole array."""
    call = pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[spec or pl.BlockSpec() for spec in in_specs],
        out_specs=list(out_specs),
        out_shape=list(out_shape),
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
    )
    return call(*operands)
