"""Pools of packed pages for the attention cases, and the layouts that are tested."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import HackFolded, HackPartitioned, Kivi, hack
from tests.kernels.cases import QUICKLY, Case, Inputs, inputs

Packed = Kivi | HackFolded | HackPartitioned

LAYOUTS: dict[str, Packed] = {
    "kivi2": Kivi(2),
    "kivi4": Kivi(4),
    "kivi2, groups of 32": Kivi(2, group=32),
    "kivi4, groups of 32": Kivi(4, group=32),
    "hack2": hack(2),
    "hack4": hack(4),
    "hack8": hack(8),
    "hack2, groups of 32": hack(2, group=32),
    "hack2, form P": hack(2, "P"),
    "hack4, form P": hack(4, "P"),
    "hack8, form P": hack(8, "P"),
}


def outliers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal values [..., channels], of which one channel in 16 is five times as large and off its origin, as
    in the keys of trained models."""
    x = np.random.default_rng(seed).standard_normal(shape)
    x[..., 3::16] = 5 * x[..., 3::16] + 12
    return x


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def seal(layout: Packed, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
    """Pool [pages, layers, ...] of k, v [pages, layers, kv_heads, page_tokens, head_dim]."""
    lead = k.shape[:2]
    page = layout.encode(k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:]))
    return {name: x.reshape(*lead, *x.shape[1:]) for name, x in page.items()}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def unsealed(layout: Packed, pool: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """What `seal` made, as k and v."""
    lead = next(iter(pool.values())).shape[:2]
    k, v = layout.decode({name: x.reshape(-1, *x.shape[2:]) for name, x in pool.items()})
    return k.reshape(*lead, *k.shape[1:]), v.reshape(*lead, *v.shape[1:])


def packed_inputs(case: Case, layout: Packed, *, outlier_keys: bool = True) -> tuple[Inputs, Inputs]:
    """The inputs of `case` with their pool sealed, and the same with the values its codes stand for, as float32."""
    x = inputs(case)
    k, v = halves(x)
    if outlier_keys:
        k = outliers(k.shape, case.seed).astype(jnp.bfloat16)
    pool: Any = seal(layout, k, v)
    plain = jnp.asarray(np.stack([np.asarray(a) for a in unsealed(layout, pool)], axis=2))
    return (
        Inputs(x.q, x.positions, x.counts, pool, x.tables),
        Inputs(x.q, x.positions, x.counts, plain, x.tables),
    )


def halves(x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """k and v of a dense pool, bfloat16 [pages, layers, kv_heads, page_tokens, head_dim] each."""
    k, v = (np.asarray(x.pool)[:, :, side].astype(jnp.bfloat16) for side in (0, 1))
    return k, v
