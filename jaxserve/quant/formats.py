"""Weight formats by name: how a matrix becomes codes, and how rows are multiplied with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.quant.native import Panels, Table
from jaxserve.quant.qtensor import QTensor


class WeightFormat(Protocol):
    """What a weight format must say. A new one is a frozen dataclass and an entry in the table below."""

    name: ClassVar[str]

    def quantize(self, weight: Any) -> QTensor:
        """Codes of `weight` [in, out], a numpy or jax array. Numpy in, numpy out: loading quantizes on the host."""
        ...

    def dequantize(self, weight: QTensor) -> Any:
        """float32 [in, out]."""
        ...

    def product(self, x: jax.Array, weight: QTensor, precision: jax.lax.Precision) -> jax.Array:
        """x [T, in] times the weight -> [T, out] float32, by XLA. Its bits may depend on T."""
        ...

    def row_product(self, x: jax.Array, weight: QTensor) -> jax.Array | None:
        """The same by a kernel that gives a row bits which depend on that row alone; None where there is none."""
        ...

    def axes(self, weight: QTensor, axes: tuple[str | None, ...]) -> QTensor:
        """`weight` with logical axis names in place of its leaves, from those of the plain matrix."""
        ...


@dataclass(frozen=True)
class Int8:
    """Symmetric 8-bit codes, one scale for each output channel; activations stay as they are.

    code = round(w / scale), scale = max |w| of the column / 127. Codes are exact in bfloat16, so 16-bit activations
    meet codes and the scale is applied to the float32 sums. float32 activations meet the dequantized matrix: it costs
    no more than converting the codes, and no multiplication is left behind the product that XLA could contract with
    an addition after it, which would make bits depend on the program around (see LinearContext.invariant_rows).
    """

    name: ClassVar[str] = "int8"

    def quantize(self, weight: Any) -> QTensor:
        xp = jnp if isinstance(weight, jax.Array) else np
        weight = weight.astype(xp.float32)
        largest = xp.abs(weight).max(axis=0)
        scale = xp.where(largest > 0, largest / 127, 1).astype(xp.float32)
        codes = xp.clip(xp.round(weight / scale), -127, 127).astype(xp.int8)
        return QTensor(codes, scale, self.name)

    def dequantize(self, weight: QTensor) -> Any:
        return weight.codes.astype("float32") * weight.scale

    def product(self, x: jax.Array, weight: QTensor, precision: jax.lax.Precision) -> jax.Array:
        if x.dtype == jnp.float32:
            return jnp.dot(x, self.dequantize(weight), precision=precision)
        codes = weight.codes.astype(x.dtype)
        return jnp.dot(x, codes, precision=precision, preferred_element_type=jnp.float32) * weight.scale

    def row_product(self, x: jax.Array, weight: QTensor) -> jax.Array | None:
        return None

    def axes(self, weight: QTensor, axes: tuple[str | None, ...]) -> QTensor:
        return replace(weight, codes=axes, scale=axes[-1:])


_FORMATS: dict[str, WeightFormat] = {f.name: f for f in (Int8(), Panels(), Table())}


def weight_formats() -> tuple[str, ...]:
    """Names that `quantize` and `--quantization` accept."""
    return tuple(sorted(_FORMATS))


def weight_format(name: str) -> WeightFormat:
    """The format called `name`. ValueError that lists the known ones otherwise."""
    try:
        return _FORMATS[name]
    except KeyError:
        raise ValueError(f"unknown quantization {name!r}: use one of {', '.join(weight_formats())}") from None


def quantize(name: str, weight: Any) -> QTensor:
    """`weight` [in, out] (numpy or jax) in the format called `name`."""
    return weight_format(name).quantize(weight)


def dequantize(weight: QTensor) -> Any:
    """float32 [in, out] of a quantized weight."""
    return weight_format(weight.format).dequantize(weight)
