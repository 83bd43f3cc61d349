"""The attention kernels and the step programs of an 8B Llama compiled for H200 on a machine without one, as tables.

    python benchmarks/h200_compile.py --rows 64 --tiles 8 --formats bf16 int8 fp8_e4m3

Needs `pip install 'jaxserve[aot]'`, no GPU. Exact for memory, registers and instructions; says nothing about time. The
last column of the steps is arithmetic: the bytes of weights and of KV at `--context` tokens a row.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
import jax.numpy as jnp

from jaxserve.aot import compile_for, ptx, targets
from jaxserve.aot.steps import LLAMA_8B, step_functions
from jaxserve.engine.step import forward_name, head_name
from jaxserve.kv import formats
from jaxserve.kv.token_format import TokenFormat
from jaxserve.models.model import Model
from jaxserve.sampling.head import HeadVariant
from jaxserve.types import PAGE_TOKENS
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill

MIB = 1 << 20
KERNELS = re.compile("triton|mosaic|cudnn")
"""In the names of what calls an attention kernel."""


def kernels(args: argparse.Namespace) -> None:
    print("| kernel | backend | pages | registers | spilled bytes | shared KiB | matrix instructions |")
    print("|---|---|---|---:|---:|---:|---|")
    for name in args.formats:
        format = formats.get(name, backend="triton")
        if not isinstance(format, TokenFormat):
            continue
        for backend in ("triton", "mosaic") if name == "bf16" else ("triton",):
            for op, rows, tokens in ((paged_decode, args.rows, 1), (paged_prefill, args.tiles, PAGE_TOKENS)):
                kernel = compiled_kernel(op, rows, tokens, format, backend, args.pages)
                kinds = Counter(kind.split(".aligned.")[-1].split(".")[0] for kind in kernel.matrix.elements())
                dtypes = sorted({kind.split(".")[-2] for kind in kernel.matrix})
                unit = "wgmma" if any(kind.startswith("wgmma") for kind in kernel.matrix) else "mma"
                matrix = ", ".join(f"{count} {unit} {shape}" for shape, count in kinds.items())
                shared = f"{kernel.launch_shared_bytes / 1024:.0f}" if kernel.launch_shared_bytes else ""
                print(
                    f"| {op.__name__} | {backend} | {name} | {kernel.registers} | {kernel.spill_bytes} | {shared} | "
                    f"{matrix} ({', '.join(dtypes)}) |",
                    flush=True,
                )


def compiled_kernel(op, rows: int, tokens: int, format: TokenFormat, backend: str, pages: int) -> ptx.Kernel:
    c, h200 = LLAMA_8B, targets()["h200"]

    def call(q, positions, pool, tables):
        return op(q, positions, pool, 1, tables, scale=c.attention_scale, layout=format.layout, backend=backend)

    shapes = (
        jax.ShapeDtypeStruct((rows, tokens, c.heads, c.head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        format.layout.pool(pages, 2, c.kv_heads, PAGE_TOKENS, c.head_dim),
        jax.ShapeDtypeStruct((rows, 128), jnp.int32),
    )
    with tempfile.TemporaryDirectory() as folder:
        compile_for(h200, call, shapes, dump=Path(folder))
        found = ptx.kernels(Path(folder), h200.arch)
    return found[op.__name__ if backend == "triton" else f"{op.__name__}_mosaic_gpu_kernel"]


def steps(args: argparse.Namespace) -> None:
    print(
        "\n| pages | program | arguments MiB | in place MiB | temporaries MiB | copies over 1 MiB | kernels "
        "| compile s | weights + KV read GB |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    heads = [head_name(args.rows, variant) for variant in HeadVariant]
    (group,) = Model.from_config(LLAMA_8B, jnp.bfloat16).kv_groups()
    for name in args.formats:
        functions = step_functions(
            LLAMA_8B, rows=args.rows, tiles=args.tiles, pages=args.pages, kv_format=name, backend=args.attention_backend
        )
        programs = {program.name: program for program in functions.programs()}
        forwards = [forward_name(args.rows, 0), forward_name(args.rows, args.tiles)]
        # Of the embedding table a step reads a few rows.
        matrices = functions.params | {"embedding": {"head": functions.params["embedding"]["head"]}}
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(matrices))
        (format,) = functions.kv.formats
        held = zip(format.kinds(group), format.pages_held(args.context // PAGE_TOKENS), strict=True)
        row = sum(kind.bytes * pages for kind, pages in held)
        for program in (programs[key] for key in (*forwards, *(heads if name == args.formats[0] else ()))):
            facts = compile_for(targets()["h200"], program.function, program.args, program.donate)
            calls = sum(count for target, count in facts.custom_calls.items() if KERNELS.search(target))
            tiles = args.tiles if program.name == forwards[1] else 0
            read = weights + row * (args.rows + bool(tiles))
            print(
                f"| {name} | `{program.name}` | {facts.argument_bytes / MIB:,.0f} | {facts.aliased_bytes / MIB:,.0f} | "
                f"{facts.temporary_bytes / MIB:.1f} | {len(facts.copies())} | {calls} | {facts.compile_s:.1f} | "
                f"{read / 1e9:.1f} |"
                if program.name in forwards
                else f"| | `{program.name}` | {facts.argument_bytes / MIB:,.0f} | {facts.aliased_bytes / MIB:,.0f} | "
                f"{facts.temporary_bytes / MIB:.1f} | {len(facts.copies())} | {calls} | {facts.compile_s:.1f} | |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="decode rows")
    parser.add_argument("--tiles", type=int, default=8, help="prefill tiles of 64 tokens")
    parser.add_argument("--pages", type=int, default=1024, help="KV pages of 64 tokens, of each class")
    parser.add_argument("--context", type=int, default=4096, help="tokens a row reads, for the last column")
    parser.add_argument(
        "--formats", nargs="+", default=["bf16", "int8", "fp8_e4m3"], help=f"of {', '.join(formats.choices())}"
    )
    parser.add_argument(
        "--attention-backend", choices=("triton", "mosaic", "cudnn"), default="triton", help="of the steps"
    )
    args = parser.parse_args()
    print(f"jax {jax.__version__}, target h200, {args.pages} pages\n")
    kernels(args)
    steps(args)


if __name__ == "__main__":
    main()
