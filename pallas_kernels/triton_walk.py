"""The page walk inside a Triton kernel: one program, one block of queries, a range of a row's pages.

The counterpart of `walk`; the paged ops' kernels differ in how they cut queries and pages into programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot
from pallas_kernels.merge import NO_KEY, Attended

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


def triton_walk(
    q: jax.Array,
    q_pos: jax.Array,
    first: jax.Array,
    end: jax.Array,
    page_id: Callable[[jax.Array], jax.Array],
    place: Callable[[jax.Array], jax.Array],
    load_keys: Callable[[jax.Array], jax.Array],
    load_values: Callable[[jax.Array], jax.Array],
    *,
    pages: int,
    page_tokens: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Attended:
    """Attention of `q` [m, head_dim], at positions `q_pos` int32 [m] (-1 sees nothing), over entries [first, end).

    `page_id(i)` reads the table, `place(i)` says where in the sequence that page stands; `load_keys`, `load_values`
    give [page_tokens, head_dim] in q's dtype.
    """

    def step(index: jax.Array, part: Attended) -> Attended:
        page = page_id(index)
        present = (page >= 0) & (page < pages)
        page = jnp.where(present, page, 0)
        s = dot(q, load_keys(page).T) * scale
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
        mixed = dot(p.astype(q.dtype), load_values(page))
        return Attended(part.o * keep[:, None] + mixed, m, part.l * keep + jnp.sum(p, axis=1))

    rows, head_dim = q.shape
    nothing = Attended(
        jnp.zeros((rows, head_dim), jnp.float32),
        jnp.full((rows,), NO_KEY, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    return lax.fori_loop(first, end, step, nothing)
