"""The reading rule of two-class formats as lists of pages. Knows no format, no layer and no bytes.

Seen from a query in page P, sink pages and the last `residual` pages up to P are read in 16 bits, all others sealed. So
what a query reads does not depend on how the pages came about: by prefill, in chunks, token by token or from a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

ABSENT = 1 << 30
"""Page id of a table entry without a page: beyond every pool, so scatters drop it. Never -1: negative indices wrap."""


@dataclass(frozen=True)
class ReadingRule:
    """`sinks` pages at the front and `residual` pages at the end, the query's own among them, are read in 16 bits.

    `exact`: prefill tiles read every page of their own chunk in 16 bits, as the papers do; their values then depend on
    where chunks begin.
    """

    sinks: int
    residual: int
    exact: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reads:
    """Page lists of the decode rows or prefill tiles of a step, in one group.

    sealed: int32 [rows, max_pages], ids of class 1 by page of the sequence; ABSENT for what is read otherwise.
    open: int32 [rows, sinks + residual], ids of class 0 in rising order of pages; ABSENT for what is not there.
    places: int32 [rows, sinks + residual + more], the page of the sequence that each entry of `open` is; -1 for none.
    """

    sealed: jax.Array
    open: jax.Array
    places: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TileReads(Reads):
    """Of prefill tiles, which may read each other.

    tiles: int32 like `places`: where the page is no page of the pool but a tile of this step, its index; ABSENT
    elsewhere. The `more` entries are tiles all of them; there are none but for an exact rule.
    seals: int32 [tiles], the page of class 1 that is made of a tile's page, if it completes it; else ABSENT.
    """

    tiles: jax.Array
    seals: jax.Array


def row_reads(rule: ReadingRule, tables: jax.Array, positions: jax.Array, page_tokens: int) -> Reads:
    """tables int32 [2, rows, max_pages], positions int32 [rows] of each row's first token, -1 for padding."""
    page = positions // page_tokens
    recent = page[:, None] + jnp.arange(1 - rule.residual, 1)
    sinks = jnp.broadcast_to(jnp.arange(rule.sinks), (page.shape[0], rule.sinks))
    places = jnp.concatenate([sinks, recent], axis=1)
    # A sink among the recent pages counts once.
    kept = jnp.concatenate([sinks < recent[:, :1], recent >= 0], axis=1)
    found = jnp.take_along_axis(tables[0], jnp.maximum(places, 0), axis=1, mode="clip")
    index = jnp.arange(tables.shape[2])
    sealed = (index >= rule.sinks) & (index <= page[:, None] - rule.residual)
    return Reads(
        sealed=jnp.where(sealed, tables[1], ABSENT),
        open=jnp.where(kept, found, ABSENT),
        places=jnp.where(kept, places, -1),
    )


def tile_reads(
    rule: ReadingRule, tables: jax.Array, slots: jax.Array, positions: jax.Array, counts: jax.Array, page_tokens: int
) -> TileReads:
    """As `row_reads`, for tiles of `counts` tokens int32 [tiles], each within one page of the sequence in its slot."""
    reads = row_reads(rule, tables, positions, page_tokens)
    sealed, places = reads.sealed, reads.places
    page = positions // page_tokens
    together = (slots[:, None] == slots) & (counts > 0)
    # [tile, entry, other tile]: the other tile is the page that the entry names.
    is_it = together[:, None] & (page == places[:, :, None]) & (reads.open[:, :, None] == ABSENT)
    tiles = jnp.where(jnp.any(is_it, axis=2), jnp.argmax(is_it, axis=2), ABSENT)
    if rule.exact:
        before = together & (page >= rule.sinks) & (page <= page[:, None] - rule.residual)
        tiles = jnp.concatenate([tiles, jnp.where(before, jnp.arange(page.shape[0]), ABSENT)], axis=1)
        places = jnp.concatenate([places, jnp.where(before, page, -1)], axis=1)
        chunk = jnp.min(jnp.where(together, page, ABSENT), axis=1)
        sealed = jnp.where(jnp.arange(sealed.shape[1]) < chunk[:, None], sealed, ABSENT)
    completes = (counts > 0) & ((positions + counts) % page_tokens == 0) & (page >= rule.sinks)
    target = jnp.take_along_axis(tables[1], jnp.maximum(page, 0)[:, None], axis=1, mode="clip")[:, 0]
    return TileReads(sealed, reads.open, places, tiles, jnp.where(completes, target, ABSENT))
