"""Device KV state: formats, pools and block tables, page movement, sizing."""

from jaxserve.kv import dense as _dense  # noqa: F401  registers bf16 and f32
from jaxserve.kv import eight_bit as _eight_bit  # noqa: F401  registers int8 and fp8_e4m3
from jaxserve.kv import packed as _packed  # noqa: F401  registers kivi and hack
from jaxserve.kv import zeroc as _zeroc  # noqa: F401  registers zeroc
from jaxserve.kv.attention import attend_layer
from jaxserve.kv.format import AttentionSpec, KVFormat, formats
from jaxserve.kv.groups import split_groups
from jaxserve.kv.meta import ABSENT, Rows, StepMeta, build_meta
from jaxserve.kv.reading import ReadingRule
from jaxserve.kv.sealed import SealedFormat
from jaxserve.kv.sizing import DoesNotFitError, size_pages
from jaxserve.kv.state import KVState, allocate, kv_shapes, kv_shardings

__all__ = [
    "ABSENT",
    "AttentionSpec",
    "DoesNotFitError",
    "KVFormat",
    "KVState",
    "ReadingRule",
    "Rows",
    "SealedFormat",
    "StepMeta",
    "allocate",
    "attend_layer",
    "build_meta",
    "formats",
    "kv_shapes",
    "kv_shardings",
    "size_pages",
    "split_groups",
]
