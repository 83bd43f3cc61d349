"""The attention kernels of each KV layout compiled for H200 on a machine without one, as a table.

    python benchmarks/h200_kernels.py

8B Llama's heads (32 of 8 KV heads, head_dim 128), pages and tiles of --block-size tokens: decode with 64 rows,
prefill with 8 tiles. Needs `pip install 'jaxserve[aot]'`, no GPU. The last column but one counts the PTX instructions
of the longest loop, the one over pages, times the warps of a program: what a page of one head costs the schedulers.
Says nothing about time.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
import jax.numpy as jnp

from jaxserve.aot import compile_for, ptx, targets
from jaxserve.types import PAGE_SIZES, PAGE_TOKENS
from pallas_kernels.layouts import Dense, FloatRows, Kivi, Layout, hack
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill

HEADS, KV_HEADS, HEAD_DIM, PAGES = 32, 8, 128, 4096
LAYOUTS: dict[str, Layout] = {
    "bf16": Dense(jnp.bfloat16),
    "kivi4": Kivi(4),
    "kivi2": Kivi(2),
    "hack8": hack(8),
    "hack4": hack(4),
    "hack2": hack(2),
    "hack2_p": hack(2, "P"),
    "zeroc 96+64": FloatRows(),
    "zeroc 64+64": FloatRows(),
    "zeroc+hack4 64+32": hack(4, group=32),
}
CHANNELS = {name: tuple(map(int, name.split()[1].split("+"))) for name in LAYOUTS if " " in name}
"""Of keys and values, where pages do not hold all."""
_INSTRUCTION = re.compile(r"\s+(?:@\S+ )?[a-z]\w*[.\s;]")
_LABEL = re.compile(r"(\$L\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+)")
_LAUNCH = re.compile(r"threads: \[(\d+), \d+, \d+\]\s+shared_memory: (\d+)")


def array(dtype: object, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def pool(layout: Layout, channels: tuple[int, ...], size: int) -> object:
    """One layer's pool of pages of `size` tokens."""
    if isinstance(layout, Dense):
        return layout.pool(PAGES, 1, KV_HEADS, size, HEAD_DIM)
    shapes = layout.shapes(KV_HEADS, size, *channels)  # type: ignore[attr-defined]
    return {name: array(one.dtype, PAGES, 1, *one.shape) for name, one in shapes.items()}


def row(name: str, op, rows: int, q_tokens: int, size: int) -> str:
    layout, channels = LAYOUTS[name], CHANNELS.get(name, (HEAD_DIM, HEAD_DIM))

    def call(q, positions, counts, pool, tables):
        return op(q, positions, pool, 0, tables, counts=counts, scale=HEAD_DIM**-0.5, backend="triton", layout=layout)

    args = (
        array(jnp.bfloat16, rows, q_tokens, HEADS, channels[0]),
        array(jnp.int32, rows),
        array(jnp.int32, rows),
        pool(layout, channels, size),
        array(jnp.int32, rows, 128),
    )
    bytes_ = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[3])) // (PAGES * KV_HEADS)
    with tempfile.TemporaryDirectory() as folder:
        compile_for(targets()["h200"], call, args, dump=Path(folder))
        kernel = ptx.kernels(Path(folder), targets()["h200"].arch)[op.__name__]
        text = next(t for p in Path(folder).glob("*.ptx") if f".entry {op.__name__}(" in (t := p.read_text()))
        thunks = "\n".join(p.read_text() for p in Path(folder).glob("*.thunk_sequence.txt"))
    launch = next(m for line in thunks.splitlines() if op.__name__ in line and (m := _LAUNCH.search(line)))
    kinds = ", ".join(f"{count} {_short(kind)}" for kind, count in kernel.matrix.items())
    return (
        f"| {name} | {op.__name__} | {bytes_:,} | {launch[1]} | {kernel.registers} | {kernel.spill_bytes} | "
        f"{int(launch[2]):,} | {_loop(text) * int(launch[1]) // 32:,} | {kinds} |"
    )


def _loop(text: str) -> int:
    """Instructions of the longest stretch of PTX that a branch goes back over."""
    starts: dict[str, int] = {}
    longest = count = 0
    for line in text.splitlines():
        if label := _LABEL.match(line):
            starts[label[1]] = count
        count += bool(_INSTRUCTION.match(line))
        if (branch := _BRANCH.search(line)) and branch[1] in starts:
            longest = max(longest, count - starts[branch[1]])
    return longest


def _short(kind: str) -> str:
    """mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 -> mma m16n8k32 s8"""
    shape = re.search(r"m\d+n\d+k\d+", kind)
    operand = kind.split(".")[-2]
    return f"{kind.split('.')[0]} {shape[0] if shape else ''} {operand}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    parser.add_argument("--block-size", type=int, default=PAGE_TOKENS, choices=PAGE_SIZES, help="tokens of a page")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, target h200\n")
    print("| layout | kernel | bytes/page/head | threads | registers | spill B | shared B | loop x warps | MMA |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    for op, rows, q_tokens in ((paged_decode, 64, 1), (paged_prefill, 8, args.block_size)):
        for name in args.layouts:
            print(row(name, op, rows, q_tokens, args.block_size), flush=True)


if __name__ == "__main__":
    main()
