"""Tokens a second of the library by KV format, each in turn on the same prompts, and what --batch-invariant costs.

    python benchmarks/kv_throughput.py                                      # two minutes on two cores
    python benchmarks/kv_throughput.py --formats bf16 hack2 --rounds 8
    python benchmarks/kv_throughput.py --model path/to/model --prompts 8    # all engines are in memory together

Ratios are to the first format; the last row is that format again with --batch-invariant.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from workload import token_prompts

from jaxserve import LLM, SamplingParams, bundled
from jaxserve.sim.report import aligned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=bundled.path(), help="folder (default: the bundled model)")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "fp8_e4m3", "kivi4", "hack4", "hack2"])
    parser.add_argument("--prompts", type=int, default=32, help="of 32 to 512 tokens; 16 run at once")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--kv-cache-memory", default="64MiB")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()

    def engine(**options: object) -> LLM:
        return LLM(
            str(args.model),
            max_num_seqs=16,
            kv_cache_memory=args.kv_cache_memory,
            enable_prefix_caching=False,
            wait_for_buckets=True,
            **options,
        )

    first = args.formats[0]
    sides = {name: engine(kv_cache_dtype=name) for name in args.formats}
    sides[f"{first}, batch-invariant"] = engine(kv_cache_dtype=first, batch_invariant=True)
    prompts = token_prompts(args.model, args.prompts)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        for name, llm in sides.items():
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            if turn:  # the first one warms up
                rates[name].append(len(prompts) * args.max_tokens / (time.perf_counter() - start))
    base = statistics.median(rates[first])
    table = [["KV", "tokens/s (median)", f"over {first}"]]
    for name, found in rates.items():
        table.append([name, f"{statistics.median(found):,.0f}", f"{statistics.median(found) / base:.2f}"])
    print(aligned(table))
    for llm in sides.values():
        llm.close()


if __name__ == "__main__":
    main()
