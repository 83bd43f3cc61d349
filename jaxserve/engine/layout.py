"""A plan as the few int32 numbers that a program reads: one vector, one transfer a step. The host writes it with numpy,
the device reads it with jnp, both through the same layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxserve.engine.shapes import EngineShape

TILE_FIELDS = 4
GRANT_FIELDS = 5


@dataclass(frozen=True)
class ForwardLayout:
    """Fields of the vector for forward[rows, tiles], in order. A slot of `slots` and a page id beyond the pool are
    padding: writes there are dropped.

    rows:   slot of each decode row
    tiles:  slot, first position and token count of each prefill tile, and of how many of its last tokens the outcome is
            read
    grants: slot, group, class, index, page of block-table entries that change
    """

    rows: int
    tiles: int
    grants: int

    @cached_property
    def size(self) -> int:
        return self.rows + TILE_FIELDS * self.tiles + GRANT_FIELDS * self.grants

    def split(self, vector):
        """(row slots [rows], tiles [4, tiles], grants [5, grants]) of a numpy or jax vector."""
        a, b = self.rows, self.rows + TILE_FIELDS * self.tiles
        return vector[:a], vector[a:b].reshape(TILE_FIELDS, self.tiles), vector[b:].reshape(GRANT_FIELDS, self.grants)

    @classmethod
    def of(cls, shape: EngineShape, tables: int, rows: int, tiles: int) -> ForwardLayout:
        """`tables`: of a slot, one for each class of each group. A decode row enters at most one new page per table and
        step, with q > 1 its upper bound may enter two."""
        per_row = 1 if shape.q == 1 else 2
        return cls(rows=rows, tiles=tiles, grants=tables * (per_row * rows + tiles))

    def blank(self, slots: int) -> np.ndarray:
        vector = np.zeros(self.size, np.int32)
        rows, tiles, grants = self.split(vector)
        rows[:] = slots
        tiles[0] = slots
        grants[0] = slots
        return vector


def blank_head_rows(rows: int, q: int, slots: int) -> np.ndarray:
    """int32 [rows, 1 + q] for head[rows]: the slot of each row and its q rows of the activation buffer; all padding."""
    blank = np.zeros((rows, 1 + q), np.int32)
    blank[:, 0] = slots
    return blank
