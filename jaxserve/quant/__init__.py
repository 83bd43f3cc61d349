"""Weight formats and the one matrix product. Knows nothing of models, checkpoints or requests."""

from jaxserve.quant.formats import Int8, WeightFormat, dequantize, quantize, weight_format, weight_formats
from jaxserve.quant.linear import LinearContext, linear, linear_heads
from jaxserve.quant.native import Panels, take
from jaxserve.quant.qtensor import QTensor

__all__ = [
    "Int8",
    "LinearContext",
    "Panels",
    "QTensor",
    "WeightFormat",
    "dequantize",
    "linear",
    "linear_heads",
    "quantize",
    "take",
    "weight_format",
    "weight_formats",
]
