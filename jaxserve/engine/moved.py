"""What threads beside the loop tell it. Imports no jax: inboxes are made where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxserve.types import ImportPrefix, Move, Prefix


@dataclass(frozen=True)
class Moved:
    """A move whose copy is complete. `staged`: for a move in, its pages on the device, some at a time."""

    move: Move
    staged: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Checked:
    """Pages of an import that are what they say they are. `content`: the host arrays of each."""

    came: ImportPrefix
    hashes: tuple[bytes, ...]
    content: tuple[Any, ...]

    @property
    def token(self) -> int:
        return self.came.token


Transferred = Prefix | Checked
"""Of a prefix on its way out or in: the last word about it, or that its pages may have places."""
