from pallas_kernels.chunk_attention.api import chunk_attention
from pallas_kernels.chunk_attention.cudnn import missing, unfit

__all__ = ["chunk_attention", "missing", "unfit"]
