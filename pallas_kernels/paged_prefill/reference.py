"""Paged prefill attention in jnp: the definition, and the production path on CPUs."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from pallas_kernels.layouts import Layout
from pallas_kernels.merge import Attended
from pallas_kernels.walk import walk


def paged_prefill(
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
    layout: Layout,
) -> Attended:
    """See `api.paged_prefill`. One tile at a time: its products are large enough, and it walks its own pages only,
    which halves the work of the tiles of one chunk."""

    def tile(args: tuple[jax.Array, ...]) -> Attended:
        q, position, table, count, *place = args
        part = walk(
            q[None],
            position[None],
            pool,
            layer,
            table[None],
            counts=count[None],
            places=place[0][None] if place else None,
            scale=scale,
            window=window,
            softcap=softcap,
            layout=layout,
            pages_per_step=1,
        )
        return jax.tree.map(lambda x: x[0], part)

    return lax.map(tile, (q, positions, tables, counts) if places is None else (q, positions, tables, counts, places))
