"""Facts from optimized HLO text: copies, aliases, collectives, kernels. Parses text; compiles nothing."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COPY = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (\(?\S+(?: \S+\))?) (copy|copy-start)\(", re.M)
_COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
_CUSTOM = re.compile(r'custom_call_target="([^"]+)"')
_HEADER = re.compile(r"^(?:ENTRY )?%\S+ \(.*\) -> .*\{$")
_DEFINED = re.compile(r"^\s*(?:ROOT )?%(\S+) = (\(?[a-z]\w*\[[\d,]*\])")
_DOT = re.compile(r" dot\(%([^,\s]+), .*?lhs_contracting_dims=\{([\d,]*)\}")
_GEMM = re.compile(
    r' custom-call\(%([^,\s)]+).*?custom_call_target="__cublas\$.*?"lhs_contracting_dimensions":\[([^\]]*)\]'
)
_ALIAS = re.compile(r"\{(\d*(?:, ?\d+)*)\}: \((\d+), \{[^}]*\}, (?:may|must)-alias\)")


@dataclass(frozen=True)
class Copy:
    """An instruction that copies an array."""

    name: str
    shape: str
    bytes: int


def shape_bytes(shape: str) -> int:
    """Bytes of the first array in an HLO shape such as `bf16[64,4096]{1,0}`."""
    match = _SHAPE.search(shape)
    if match is None or match[1] not in _BYTES:
        return 0
    return _BYTES[match[1]] * math.prod(int(n) for n in match[2].split(",") if n)


def copies(text: str, at_least: int = 1 << 20) -> list[Copy]:
    """Copies of arrays of `at_least` bytes, in any computation; fusions whose root is nothing but a copy count."""
    found = [Copy(m[1], m[2], shape_bytes(m[2])) for m in _COPY.finditer(text)]
    return [copy for copy in found if copy.bytes >= at_least]


def aliases(text: str) -> dict[str, int]:
    """Output index -> parameter number of the buffers that are updated in place."""
    header = text[: text.find("\n")]
    return {m[1].replace(" ", ""): int(m[2]) for m in _ALIAS.finditer(header)}


def collectives(text: str) -> Counter[str]:
    """How often each kind of collective occurs."""
    return Counter(m[1] for m in _COLLECTIVE.finditer(text))


def custom_calls(text: str) -> Counter[str]:
    """How often each custom call target occurs: cuBLAS and cuDNN calls, Triton and Mosaic kernels."""
    return Counter(_CUSTOM.findall(text))


def dot_flops(text: str) -> int:
    """Floating-point operations of all matrix products, cuBLAS calls included. A product inside a loop counts once, and
    what runs inside Triton or Mosaic kernels does not count."""
    total = 0
    shapes: dict[str, list[int]] = {}
    for line in text.splitlines():
        if _HEADER.match(line):
            shapes = {}
        defined = _DEFINED.match(line)
        if defined is None:
            continue
        shapes[defined[1]] = _sizes(defined[2])
        product = _DOT.search(line) or _GEMM.search(line)
        if product is not None:
            lhs = shapes[product[1]]
            contracted = [int(d) for d in re.findall(r"\d+", product[2])]
            total += 2 * math.prod(_sizes(defined[2])) * math.prod(lhs[d] for d in contracted)
    return total


def _sizes(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    return [int(n) for n in match[2].split(",") if n] if match else []
