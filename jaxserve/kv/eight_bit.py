"""8-bit KV: a code per number, a scale per token and KV head. One page class, quantized when it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxserve.kv.format import formats
from jaxserve.kv.token_format import TokenFormat
from pallas_kernels.backends import resolve
from pallas_kernels.layouts import Code, EightBitColumns, EightBitRows, Fp8, HostEightBitRows, Int8, TokenLayout

_LAYOUTS: dict[str, type[Any]] = {
    "native": HostEightBitRows,
    "invariant": HostEightBitRows,
    "triton": EightBitRows,
    "mosaic": EightBitRows,
}
"""By the backend that reads them; others want columns."""


@dataclass(frozen=True)
class EightBitFormat(TokenFormat):
    """What is left to a format: its `code`. Source: docs/techniques/8-bit-kv.md."""

    calibrated: tuple[tuple[float, float], ...] = ()
    """(k_scale, v_scale) of each layer of the group, from a checkpoint. Empty: each token has its own scale."""

    code: ClassVar[Code]

    @property
    def layout(self) -> TokenLayout:
        layout: TokenLayout = _LAYOUTS.get(resolve(self.backend), EightBitColumns)(self.code, self.calibrated)
        return layout

    def finite(self, page: Any) -> bool:
        codes = {name: leaf.view(self.code.dtype) for name, leaf in page.items() if name != "sides"}
        return super().finite(page | codes)


@formats.register("int8")
@dataclass(frozen=True)
class Int8Format(EightBitFormat):
    """x = scale * code + zero. Bytes per token and head: head_dim + 4."""

    code = Int8()


@formats.register("fp8_e4m3", "fp8")
@dataclass(frozen=True)
class Fp8E4M3Format(EightBitFormat):
    """x = scale * code, the code a float8_e4m3fn. Bytes per token and head: head_dim + 2."""

    code = Fp8()
