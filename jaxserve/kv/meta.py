"""What attention and KV writes need to know of a step, computed once per step. Knows no format, no model, no request.

A step has D decode rows of q tokens and N prefill tiles of as many tokens as a page has. A row's tokens have
consecutive positions within one page, and so do a tile's. Padding rows and tiles have count 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kv.reading import ABSENT, ReadingRule, Reads, row_reads, tile_reads
from jaxserve.types import PAGE_TOKENS

__all__ = ["ABSENT", "Rows", "StepMeta", "build_meta"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunks:
    """The prefill tiles of a step as chunks: consecutive tiles of a sequence, the first at the beginning of a page.

    first: int32 [tiles], the tile with which the chunk of each begins; -1 for padding and for tiles that begin inside a
    page. counts: int32 [tiles], tokens of each. before: int32 [tiles], position of the chunk's first token.
    """

    first: jax.Array
    counts: jax.Array
    before: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The decode rows or the prefill tiles of a step, as one KV group sees them.

    positions: int32 [rows], of the first token; -1 for padding. counts: int32 [rows], tokens to write; 0 for padding.
    tables: int32 [classes, rows, max_pages], page ids by page class; an id out of range is absent.
    pages: int32 [rows], the class-0 page that takes the row's tokens, ABSENT for padding. offsets: int32 [rows], the
    first token's place in it. reads: which pages are read in which form, in a group with two classes. chunks: what
    tiles belong together, of tiles only. page_tokens: tokens of a page, and of a tile.
    """

    positions: jax.Array
    counts: jax.Array
    tables: jax.Array
    pages: jax.Array
    offsets: jax.Array
    reads: Reads | None = None
    chunks: Chunks | None = None
    page_tokens: int = field(default=PAGE_TOKENS, metadata={"static": True})

    def targets(self, q_tokens: int) -> tuple[jax.Array, jax.Array]:
        """Of decode rows of `q_tokens`: page and place in it of each token, int32 [rows * q_tokens]; ABSENT pages for
        tokens that are not written."""
        token = jnp.arange(q_tokens)
        pages = jnp.where(token < self.counts[:, None], self.pages[:, None], ABSENT)
        return pages.reshape(-1), (self.offsets[:, None] + token).reshape(-1)

    def before_chunks(self) -> Rows:
        """Tiles as they see what lies before their chunk: the pages from its first one on are absent. Those of no chunk
        see everything."""
        if self.chunks is None:
            raise ValueError("decode rows are of no chunk.")
        before, chunk = self.chunks.before, self.chunks.first >= 0
        own = jnp.arange(self.tables.shape[-1]) >= before[:, None] // self.page_tokens
        # The last token before it is seen by all of the tile; -1, where there is none, is padding.
        positions = jnp.where(chunk & (self.positions >= 0), before - 1, self.positions)
        return replace(self, positions=positions, tables=jnp.where(own & chunk[:, None], ABSENT, self.tables))

    def as_pages(self, *tokens: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Tiles as the pages they are part of, because a scatter of tokens is a loop over tokens on CPUs: the tile's
        token i belongs at its offset + i.

        tokens: arrays [tiles, kv_heads, page_tokens, ...] by token of the tile. Returns which places of its page the
        tile writes, bool [tiles, page_tokens], and the arrays by place; elsewhere they hold anything.
        """
        place = jnp.arange(self.page_tokens) - self.offsets[:, None]
        inside = (place >= 0) & (place < self.counts[:, None])
        source = jnp.clip(place, 0, self.page_tokens - 1)[:, None, :, None]
        return inside, [jnp.take_along_axis(x, source, axis=2) for x in tokens]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMeta:
    """`decode[g]` and `tiles[g]` are the step's rows and tiles for group g; an empty section has no entries."""

    decode: tuple[Rows, ...]
    tiles: tuple[Rows, ...]

    def reading(self, tiles: jax.Array) -> StepMeta:
        """The same step with only those of the tiles that bool [tiles] names; for attention, not for writing."""
        fewer = [
            replace(t, positions=jnp.where(tiles, t.positions, -1), counts=jnp.where(tiles, t.counts, 0))
            for t in self.tiles
        ]
        return replace(self, tiles=tuple(fewer))


def build_meta(
    tables: Sequence[jax.Array],
    decode_slots: jax.Array,
    decode_positions: jax.Array,
    decode_counts: jax.Array,
    tile_slots: jax.Array,
    tile_positions: jax.Array,
    tile_counts: jax.Array,
    rules: Sequence[ReadingRule | None] | None = None,
    page_tokens: int = PAGE_TOKENS,
) -> StepMeta:
    """StepMeta from int32 arrays of D rows and N tiles; `tables[g]` is int32 [classes, slots, max_pages].

    A row or tile with count 0 is padding: its slot and position may hold anything. `rules[g]`: the reading rule of
    group g if it has two classes.
    """
    rules = rules or (None,) * len(tables)
    decode = _section(tables, decode_slots, decode_positions, decode_counts, page_tokens)
    tiles = _section(tables, tile_slots, tile_positions, tile_counts, page_tokens)
    chunks = _chunks(tile_slots, tile_positions, tile_counts, page_tokens)
    return StepMeta(
        decode=tuple(
            replace(rows, reads=row_reads(rule, rows.tables, rows.positions, page_tokens)) if rule else rows
            for rows, rule in zip(decode, rules, strict=False)
        ),
        tiles=tuple(
            replace(
                rows,
                chunks=chunks,
                reads=tile_reads(rule, rows.tables, tile_slots, rows.positions, rows.counts, page_tokens)
                if rule
                else None,
            )
            for rows, rule in zip(tiles, rules, strict=False)
        ),
    )


def _section(
    tables: Sequence[jax.Array], slots: jax.Array, positions: jax.Array, counts: jax.Array, page_tokens: int
) -> tuple[Rows, ...]:
    if slots.shape[0] == 0:
        return ()
    live = counts > 0
    positions = jnp.where(live, positions, -1)
    index = jnp.where(live, positions // page_tokens, 0)
    rows = []
    for table in tables:
        own = table.at[:, slots].get(mode="clip")
        page = jnp.take_along_axis(own[0], index[:, None], axis=1, mode="clip")[:, 0]
        rows.append(
            Rows(
                positions=positions,
                counts=counts,
                tables=own,
                pages=jnp.where(live, page, ABSENT),
                offsets=jnp.where(live, positions % page_tokens, 0),
                page_tokens=page_tokens,
            )
        )
    return tuple(rows)


def _chunks(slots: jax.Array, positions: jax.Array, counts: jax.Array, page_tokens: int) -> Chunks:
    whole = (counts > 0) & (positions % page_tokens == 0)
    follows = (slots[1:] == slots[:-1]) & (positions[1:] == positions[:-1] + page_tokens)
    goes_on = jnp.append(False, follows & whole[1:] & whole[:-1])[: slots.shape[0]]
    index = jnp.arange(slots.shape[0], dtype=jnp.int32)
    first = lax.cummax(jnp.where(goes_on, 0, index))
    return Chunks(jnp.where(whole, first, -1), counts, positions[first])
