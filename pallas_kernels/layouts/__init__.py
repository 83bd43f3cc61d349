"""Layouts of KV pages, one file each; `layout` holds the protocols."""

from pallas_kernels.layouts.codes import Code, Fp8, Int8
from pallas_kernels.layouts.columns import Columns
from pallas_kernels.layouts.dense import Dense
from pallas_kernels.layouts.eight_bit import EightBitColumns, EightBitRows
from pallas_kernels.layouts.floats import float_layout
from pallas_kernels.layouts.hack import HackFolded, HackPartitioned, hack
from pallas_kernels.layouts.host_dense import HostDense
from pallas_kernels.layouts.host_eight_bit import HostEightBitRows
from pallas_kernels.layouts.kivi import Kivi
from pallas_kernels.layouts.layout import (
    FloatLayout,
    KernelLayout,
    KernelPages,
    Layout,
    PageShape,
    SealedLayout,
    TokenLayout,
)
from pallas_kernels.layouts.sealed_floats import FloatColumns, FloatRows, HostFloatRows

__all__ = [
    "Code",
    "Columns",
    "Dense",
    "EightBitColumns",
    "EightBitRows",
    "FloatColumns",
    "FloatLayout",
    "FloatRows",
    "Fp8",
    "HackFolded",
    "HackPartitioned",
    "HostDense",
    "HostEightBitRows",
    "HostFloatRows",
    "Int8",
    "KernelLayout",
    "KernelPages",
    "Kivi",
    "Layout",
    "PageShape",
    "SealedLayout",
    "TokenLayout",
    "float_layout",
    "hack",
]
