"""8-bit KV: a code per number, a scale per token and KV head. One page class, quantized when it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jaxserve.kv.format import formats
from jaxserve.kv.rotation import check_rotation, turned_keys, turned_queries
from jaxserve.kv.token_format import TokenFormat
from jaxserve.types import KVGroup
from pallas_kernels.backends import layout_for
from pallas_kernels.layouts import Code, EightBitColumns, EightBitRows, Fp8, HostEightBitRows, Int8, TokenLayout


@dataclass(frozen=True)
class EightBitFormat(TokenFormat):
    """What is left to a format: its `code`. Source: docs/techniques/8-bit-kv.md."""

    calibrated: tuple[tuple[float, float], ...] = ()
    """(k_scale, v_scale) of each layer of the group, from a checkpoint. Empty: each token has its own scale."""
    key_rotation: str = "none"
    """How keys are turned before they become codes, and queries before they read them (kv/rotation.py)."""

    code: ClassVar[Code]

    def __post_init__(self) -> None:
        check_rotation(self.key_rotation)
        if self.calibrated and self.key_rotation != "none":
            raise ValueError(
                f"--kv-key-rotation {self.key_rotation}: this checkpoint brings scales of its keys as they are; "
                "use none"
            )

    @property
    def layout(self) -> TokenLayout:
        kind: type[Any] = layout_for(
            self.backend, kernels=EightBitRows, host=HostEightBitRows, reference=EightBitColumns
        )
        layout: TokenLayout = kind(self.code, self.calibrated)
        return layout

    def payload(self, group: KVGroup, pages: tuple[int, ...]) -> Any:
        check_rotation(self.key_rotation, group.head_dim)
        return super().payload(group, pages)

    def storable(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return turned_keys(k, self.key_rotation), v

    def asking(self, q: jax.Array) -> jax.Array:
        return turned_queries(q, self.key_rotation)

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
