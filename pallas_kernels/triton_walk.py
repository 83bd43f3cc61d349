"""The page walk inside a Triton kernel: one program, one block of queries, a range of a row's pages.

The counterpart of `walk`; the paged ops' kernels differ in how they cut queries and pages into programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.layouts import KernelPages
from pallas_kernels.merge import NO_KEY

LOG2E = math.log2(math.e)


def page_range(
    position: jax.Array, count: jax.Array, window: int | None, page_tokens: int, columns: int
) -> tuple[jax.Array, jax.Array]:
    """First page and end of the pages that the queries [position, position + count) see, within a table of `columns`
    entries (beyond it lies another row's table); empty for padding."""
    end = jnp.where(position >= 0, jnp.minimum((position + count - 1) // page_tokens + 1, columns), 0)
    if window is None:
        return jnp.zeros_like(end), end
    return jnp.maximum(position - window + 1, 0) // page_tokens, end


class Walked(NamedTuple):
    """What `Attended` is outside of a kernel, with `o` in arrays side by side."""

    o: tuple[jax.Array, ...]
    m: jax.Array
    l: jax.Array  # noqa: E741


def load_parts(ref: Any, parts: int) -> tuple[jax.Array, ...]:
    """A block [m, width] of `ref` as `parts` arrays side by side."""
    width = ref.shape[-1] // parts
    return tuple(ref[:, pl.ds(part * width, width)] for part in range(parts))


def store(part: Walked, o_ref: Any, m_ref: Any, l_ref: Any) -> None:
    width = o_ref.shape[-1] // len(part.o)
    for index, o in enumerate(part.o):
        o_ref[:, pl.ds(index * width, width)] = o
    m_ref[...] = part.m
    l_ref[...] = part.l


def triton_walk(
    q: tuple[jax.Array, ...],
    q_pos: jax.Array,
    first: jax.Array,
    end: jax.Array,
    page_id: Callable[[jax.Array], jax.Array],
    place: Callable[[jax.Array], jax.Array],
    page_products: KernelPages,
    *,
    o_parts: int,
    value_dim: int,
    pages: int,
    page_tokens: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Walked:
    """Attention of `q`, [m, head_dim] in arrays side by side, over entries [first, end).

    `q_pos` int32 [m] are the positions of the queries; -1 sees nothing. `page_id(i)` reads the table, `place(i)` says
    where in the sequence that page stands.
    """
    prepared = page_products.prepare(q)

    def step(index: jax.Array, part: Walked) -> Walked:
        page = page_id(index)
        present = (page >= 0) & (page < pages)
        page = jnp.where(present, page, 0)
        s = page_products.scores(prepared, page) * scale
        if softcap is not None:
            s = softcap * jnp.tanh(s / softcap)
        k_pos = place(index) * page_tokens + lax.broadcasted_iota(jnp.int32, (1, page_tokens), 1)
        seen = (k_pos <= q_pos[:, None]) & present
        if window is not None:
            seen &= k_pos > q_pos[:, None] - window
        s = jnp.where(seen, s, NO_KEY)
        m = jnp.maximum(part.m, jnp.max(s, axis=1))
        p = jnp.where(seen, jnp.exp2((s - m[:, None]) * LOG2E), 0.0)
        keep = jnp.exp2((part.m - m) * LOG2E)
        mixed = page_products.mix(p, page)
        o = tuple(old * keep[:, None] + new for old, new in zip(part.o, mixed, strict=True))
        return Walked(o, m, part.l * keep + jnp.sum(p, axis=1))

    rows = q[0].shape[0]
    nothing = Walked(
        tuple(jnp.zeros((rows, value_dim // o_parts), jnp.float32) for _ in range(o_parts)),
        jnp.full((rows,), NO_KEY, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    return lax.fori_loop(first, end, step, nothing)
