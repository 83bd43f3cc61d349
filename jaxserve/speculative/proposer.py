"""The seam for speculation: what guesses the next tokens of each sequence, on the device, at the end of `head`."""

from __future__ import annotations

from typing import Protocol

from jax import Array

from jaxserve.sampling.state import Slots


class Proposer(Protocol):
    """Proposes deterministic drafts. Frozen and hashable: it is part of a compiled program."""

    def propose(self, slots: Slots, ids: Array) -> tuple[Array, Array]:
        """Drafts that may follow the history of the slots `ids` int32 [R] (out of range: padding).

        Returns tokens int32 [R, q - 1], where q - 1 is the width of `slots.drafts`, and how many of them count int32
        [R] (0: none). Reads slots only. A row's drafts depend on its own slot alone. The head cuts the number to what
        page and length allow and stores both.
        """
        ...
