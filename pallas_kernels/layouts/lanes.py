"""Unpacking codes inside a Triton kernel, four to a 32-bit operation. Knows bytes and fields, not pages.

Written out in array operations the compiler unpacks byte by byte, at two scalar operations a code or more: at 2 bits
that makes a kernel slower than the memory it reads. Interpreted kernels take the array operations, with equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton


@dataclass(frozen=True)
class Field:
    """Which bits of each byte: field `index` of those `bits` wide; where `upper` (uint8, 0 or 255) is set, the next
    field up."""

    bits: int
    index: int
    upper: jax.Array | None = None


def to_int8(packed: jax.Array, field: Field, *, interpret: bool) -> jax.Array:
    """The signed codes in `field` of `packed` (uint8), times 2^(8 - bits), as int8.

    A signed code is the code less half the levels: the code with its highest bit flipped, in the upper bits of a byte.
    One shift and one mask-and-flip for four codes.
    """
    if interpret:
        return ((_codes(packed, field) << (8 - field.bits)) ^ 0x80).astype(jnp.int8)
    mask = {2: "0xC0C0C0C0", 4: "0xF0F0F0F0", 8: "0xFFFFFFFF"}[field.bits]

    def plane(into: str, source: str, index: int) -> str:
        # 0x6A: (a & b) ^ c
        flip = f"lop3.b32 {into}, {into}, {mask}, 0x80808080, 0x6A;"
        return f"shl.b32 {into}, {source}, {8 - field.bits * (index + 1)}; {flip}"

    asm, args = _select(plane, packed, field, inputs=1)
    return _run(f"{asm} mov.b32 $0, codes;", args, "=r", jnp.int8)


def to_bfloat16(packed: jax.Array, field: Field, *, interpret: bool) -> jax.Array:
    """The codes in `field` of `packed` (uint8), of at most 4 bits, as bfloat16."""
    if interpret:
        return _codes(packed, field).astype(jnp.int32).astype(jnp.bfloat16)
    mask = {2: "0x03030303", 4: "0x0F0F0F0F"}[field.bits]

    def plane(into: str, source: str, index: int) -> str:
        return f"shr.b32 {into}, {source}, {field.bits * index}; and.b32 {into}, {into}, {mask};"

    asm, args = _select(plane, packed, field, inputs=2)
    # 0x43 above a code below 128 is the bfloat16 of 128 + code; 1 * x - 128 takes it off.
    asm += """
        prmt.b32 $0, codes, 0x43434343, 0x4140;
        prmt.b32 $1, codes, 0x43434343, 0x4342;
        fma.rn.bf16x2 $0, $0, one, bias;
        fma.rn.bf16x2 $1, $1, one, bias;"""
    constants = ".reg .b32 one, bias; mov.b32 one, 0x3F803F80; mov.b32 bias, 0xC300C300;"
    return _run(f"{constants} {asm}", args, "=r,=r", jnp.bfloat16)


def _codes(packed: jax.Array, field: Field) -> jax.Array:
    mask = (1 << field.bits) - 1
    codes = (packed >> (field.bits * field.index)) & mask
    if field.upper is None:
        return codes
    return jnp.where(field.upper > 0, (packed >> (field.bits * (field.index + 1))) & mask, codes)


def _select(
    plane: Callable[[str, str, int], str], packed: jax.Array, field: Field, inputs: int
) -> tuple[str, list[jax.Array]]:
    """PTX that puts four codes into the register `codes`, and its arguments, of which the first is $`inputs`.
    `plane(into, source, index)` is the PTX for one field."""
    source = f"${inputs}"
    if field.upper is None:
        return f".reg .b32 codes; {plane('codes', source, field.index)}", [packed]
    # 0xE4: c ? a : b, bit by bit.
    chosen = f"lop3.b32 codes, high, low, ${inputs + 1}, 0xE4;"
    both = f"{plane('low', source, field.index)} {plane('high', source, field.index + 1)}"
    return f".reg .b32 codes, low, high; {both} {chosen}", [packed, field.upper]


def _run(asm: str, args: list[jax.Array], outputs: str, dtype: type) -> jax.Array:
    (result,) = pltriton.elementwise_inline_asm(
        "{ " + asm + " }",
        args=args,
        constraints=",".join([outputs] + ["r"] * len(args)),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return result
