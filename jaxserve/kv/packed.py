"""Sealed pages of packed codes: KIVI and HACK. One line each; what they do is in their layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jaxserve.kv.format import formats
from jaxserve.kv.sealed import SealedFormat
from pallas_kernels.layouts import HackFolded, HackPartitioned, Kivi, SealedLayout, hack


@dataclass(frozen=True)
class PackedFormat(SealedFormat):
    """What is left to a format: the `codes` of its sealed pages."""

    codes: ClassVar[Kivi | HackFolded | HackPartitioned]

    quant_group: int | None = None
    """Channels that share a scale where quantization is per token, 32 or 64. None: 64, or 32 where pages hold no more
    of a head."""

    @property
    def layout(self) -> SealedLayout:
        narrow = self.channels is not None and min(self.channels) == 32
        return replace(self.codes, group=self.quant_group or (32 if narrow else 64))

    @property
    def usual_rotation(self) -> str:
        # docs/measurements/kv-quality.md: 4 bits are within their bounds with it only, 8 need none. Leading channels
        # are in a basis already; form P has not been measured.
        coarse = self.codes.bits <= 4 and not isinstance(self.codes, HackPartitioned)
        return "hadamard" if coarse and self.channels is None else "none"


@formats.register("kivi4")
@dataclass(frozen=True)
class Kivi4(PackedFormat):
    """KIVI with 4 bits: keys per channel, values per token, dequantized where they are read."""

    codes = Kivi(4)


@formats.register("kivi2")
@dataclass(frozen=True)
class Kivi2(PackedFormat):
    """KIVI with 2 bits."""

    codes = Kivi(2)


@formats.register("hack8")
@dataclass(frozen=True)
class Hack8(PackedFormat):
    """HACK with 8 bits: integer products with q and p in 8 bits, form F (KIVI's axes)."""

    codes = hack(8)


@formats.register("hack4")
@dataclass(frozen=True)
class Hack4(PackedFormat):
    """HACK with 4 bits, form F."""

    codes = hack(4)


@formats.register("hack2")
@dataclass(frozen=True)
class Hack2(PackedFormat):
    """HACK with 2 bits, form F."""

    codes = hack(2)


@formats.register("hack8_p")
@dataclass(frozen=True)
class Hack8P(PackedFormat):
    """HACK with 8 bits, form P: keys per token, values per channel."""

    codes = hack(8, "P")


@formats.register("hack4_p")
@dataclass(frozen=True)
class Hack4P(PackedFormat):
    """HACK with 4 bits, form P."""

    codes = hack(4, "P")


@formats.register("hack2_p")
@dataclass(frozen=True)
class Hack2P(PackedFormat):
    """HACK with 2 bits, form P."""

    codes = hack(2, "P")
