"""ZeroC (arXiv:2408.04107): sealed pages that hold the leading channels of each head. Knows no model, no calibration.

The model writes keys and values in a basis whose leading channels carry the most (models/basis.py); what is left to the
format is to hold only these, in 16 bits (`zeroc`) or in the codes of another sealed format (`zeroc+hack4`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxserve.kv.format import formats
from jaxserve.kv.sealed import SealedFormat
from pallas_kernels.backends import layout_for
from pallas_kernels.layouts import FloatColumns, FloatRows, HostFloatRows, SealedLayout

NAME = "zeroc"


@formats.register(NAME)
@dataclass(frozen=True)
class ZeroC(SealedFormat):
    """The leading `channels` in 16 bits."""

    @property
    def layout(self) -> SealedLayout:
        kind: type[Any] = layout_for(self.backend, kernels=FloatRows, host=HostFloatRows, reference=FloatColumns)
        layout: SealedLayout = kind(jnp.dtype(self.dtype))
        return layout


def held_by(name: str) -> str | None:
    """The name of the format that holds the channels of the ZeroC format called `name`; None if that is no ZeroC.

    Raises:
        ValueError: that format does not seal pages.
    """
    if name == NAME:
        return NAME
    if not name.startswith(f"{NAME}+"):
        return None
    sealing = [one for one in formats.names() if one != NAME and "channels" in formats.options(one)]
    inner = name.removeprefix(f"{NAME}+")
    if inner not in sealing:
        raise ValueError(
            f"--kv-cache-dtype {name} does not exist: ZeroC keeps the first and the newest pages whole, so it goes "
            f"with formats that seal full pages: {NAME}, {', '.join(f'{NAME}+{one}' for one in sealing)}."
        )
    return inner
