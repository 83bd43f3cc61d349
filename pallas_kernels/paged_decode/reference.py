"""Paged decode attention in jnp: the definition, and the production path on CPUs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.merge import Attended
from pallas_kernels.paged_prefill import reference as prefill
from pallas_kernels.walk import walk


def paged_decode(
    q: jax.Array, positions: jax.Array, pool: Any, layer: int | jax.Array, tables: jax.Array, **options: Any
) -> Attended:
    """See `api.paged_decode`."""
    # Measured on two cores, float16: up to 8 rows four pages a step take a fifth less time than two, because each step
    # costs about a microsecond an operation; at 32 rows they take seven times as much, out of the cache.
    pages_per_step = 4 if q.shape[0] <= 8 else 2
    return walk(q, positions, pool, layer, tables, pages_per_step=pages_per_step, **options)


def tiled(
    q: jax.Array, positions: jax.Array, pool: Any, layer: int | jax.Array, tables: jax.Array, **options: Any
) -> Attended:
    """The same, with each row computed as the first queries of a prefill tile of one page: the shapes of the products
    and with them the bits are those of a prefill, whatever the number of rows. Costs page_tokens times the FLOPs."""
    q_tokens = q.shape[1]
    page_tokens = options["layout"].page_shape(pool)[2]
    padded = jnp.pad(q, ((0, 0), (0, page_tokens - q_tokens), (0, 0), (0, 0)))
    part = prefill.paged_prefill(padded, positions, pool, layer, tables, **options)
    return jax.tree.map(lambda x: x[:, :q_tokens], part)
