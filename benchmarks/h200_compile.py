"""The step programs of an 8B Llama compiled for H200 on a machine without one, as a table.

    python benchmarks/h200_compile.py --rows 64 --tiles 8 --pages 4096

Needs `pip install 'jaxserve[aot]'`, no GPU. Exact for memory; says nothing about time.
"""

from __future__ import annotations

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax

from jaxserve.aot import compile_for, targets
from jaxserve.aot.steps import LLAMA_8B, step_functions
from jaxserve.engine.step import forward_name, head_name
from jaxserve.sampling.head import HeadVariant

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="decode rows")
    parser.add_argument("--tiles", type=int, default=8, help="prefill tiles of 64 tokens")
    parser.add_argument("--pages", type=int, default=1024, help="KV pages of 64 tokens (8 MiB each)")
    args = parser.parse_args()
    functions = step_functions(LLAMA_8B, rows=args.rows, tiles=args.tiles, pages=args.pages)
    programs = {program.name: program for program in functions.programs()}
    names = [forward_name(args.rows, 0), forward_name(args.rows, args.tiles)]
    names += [head_name(args.rows, variant) for variant in HeadVariant]
    print(f"jax {jax.__version__}, target h200, {args.pages} pages\n")
    print("| program | arguments MiB | in place MiB | temporaries MiB | copies over 1 MiB | kernels | compile s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in names:
        program = programs[name]
        facts = compile_for(targets()["h200"], program.function, program.args, program.donate)
        kernels = sum(count for target, count in facts.custom_calls.items() if "triton" in target)
        print(
            f"| `{name}` | {facts.argument_bytes / MIB:,.0f} | {facts.aliased_bytes / MIB:,.0f} | "
            f"{facts.temporary_bytes / MIB:.1f} | {len(facts.copies())} | {kernels} | {facts.compile_s:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
