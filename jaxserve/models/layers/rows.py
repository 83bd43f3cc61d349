"""What a layer is told of the rows that it works on."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxserve.models.layers.rope import Rotation


class Rows(NamedTuple):
    """The rows of a step, T in all.

    turn: by what the layer's RoPE turns them. live: bool [T]; the others are padding. read: bool [T], those of the live
    ones whose outcome is wanted: of the others, only keys and values.
    """

    turn: Rotation
    live: jax.Array
    read: jax.Array
