"""Layouts of KV pages, one file each; `layout` holds the protocols."""

from pallas_kernels.layouts.columns import Columns
from pallas_kernels.layouts.dense import Dense
from pallas_kernels.layouts.hack import HackFolded, HackPartitioned, hack
from pallas_kernels.layouts.kivi import Kivi
from pallas_kernels.layouts.layout import KernelPages, Layout, SealedLayout, TokenLayout

__all__ = [
    "Columns",
    "Dense",
    "HackFolded",
    "HackPartitioned",
    "KernelPages",
    "Kivi",
    "Layout",
    "SealedLayout",
    "TokenLayout",
    "hack",
]
