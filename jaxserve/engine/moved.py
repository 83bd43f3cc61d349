"""What a mover tells the loop. Imports no jax: inboxes are made where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxserve.types import Move


@dataclass(frozen=True)
class Moved:
    """A move whose copy is complete. `staged`: for a move in, its pages on the device, some at a time."""

    move: Move
    staged: tuple[Any, ...] = ()
