"""Swapping in gathered copies beside the steps against one synchronous copy per page.

    python benchmarks/swap.py                                  # about two minutes
    python benchmarks/swap.py --budget 2048 --gigabytes 24 --seeds 2

Conversations in four classes of importance, drawn at random, under `priority`: a better class takes the place of a
worse one, whose pages go to host memory and come back (FastSwitch's setting, arXiv:2411.18424). The same scheduler, on
an A100's published cost; `gathered` is what the engine does, up to 16 pages in a copy, beside the steps. The next step
waits for the others: `per-page` copies page by page, `per-block` the blocks of 16 tokens of each layer, as vLLM did.
Time between tokens: of all tokens, and of those whose sequence had its place all the time (what a swap does to its
neighbours). Bars: 4 times fewer copies, p99.9 2 times better.
"""

from __future__ import annotations

import argparse
import random
import statistics

from msgspec import structs

from jaxserve.sim import traces
from jaxserve.sim.link import LINKS
from jaxserve.sim.machine import PUBLISHED_KV_TOKENS, published
from jaxserve.sim.metrics import figures
from jaxserve.sim.report import aligned
from jaxserve.sim.sweep import PolicySpec, Setting, capacity
from jaxserve.sim.workload import Trace

FIGURES = ("swap_copies", "swap_bytes", "tbt_p99.9_s", "steady_p99.9_s", "jct_mean_s")


def with_classes(trace: Trace, classes: int = 4) -> Trace:
    draw = random.Random(0)
    return Trace(trace.name, tuple(structs.replace(job, priority=draw.randrange(classes)) for job in trace.jobs))


def measured(setting: Setting, how: str, gigabytes: float, rate: float, seed: int) -> dict[str, float]:
    options = f"host_kv_tokens={4 * PUBLISHED_KV_TOKENS}:host_link_gbps={8 * gigabytes}:host_copies={how}"
    run = setting.run(PolicySpec.parse(f"priority:{options}"), rate, seed)
    found = figures(run)
    return {
        **found,
        "swap_bytes": found["swap_out_bytes"] + found["swap_in_bytes"],
        "steady_p99.9_s": run.steady.figures()["tbt_p99.9_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--budget", type=int, nargs="+", default=[256], help="tokens of a step (default 256)")
    parser.add_argument(
        "--gigabytes", type=float, nargs="+", default=[24.0, 12.0], help="a second of the host link (default 24 12)"
    )
    args = parser.parse_args()
    trace = with_classes(traces.load("azure-conv"))
    head = ["budget", "GB/s", "copies are", "copies", "GB", "p99.9 TBT s", "undisplaced", "mean JCT s"]
    rows, verdicts = [head], []
    for budget in args.budget:
        machine = published(max_num_batched_tokens=budget)
        longest = max(turn.output for turn in trace.turns)
        setting = Setting(trace=trace, machine=machine, jobs=args.requests, arrivals="poisson", max_tokens=longest)
        rate = args.load * capacity(setting)
        for gigabytes in args.gigabytes:
            mean = {}
            for how in sorted(LINKS, reverse=True):
                runs = [measured(setting, how, gigabytes, rate, seed) for seed in range(args.seeds)]
                one = mean[how] = {name: statistics.fmean(run[name] for run in runs) for name in FIGURES}
                cells = [f"{one['swap_copies']:.0f}", f"{one['swap_bytes'] / 1e9:.0f}"]
                cells += [f"{one[name]:.3f}" for name in ("tbt_p99.9_s", "steady_p99.9_s")]
                rows.append([str(budget), f"{gigabytes:g}", how, *cells, f"{one['jct_mean_s']:.1f}"])
            if not mean["gathered"]["swap_copies"]:
                verdicts.append(
                    f"budget {budget}, {gigabytes:g} GB/s: nothing had to be swapped; raise --requests or --load"
                )
                continue
            for how in ("per-page", "per-block"):
                fewer, better, steadier = (
                    mean[how][name] / mean["gathered"][name]
                    for name in ("swap_copies", "tbt_p99.9_s", "steady_p99.9_s")
                )
                verdicts.append(
                    f"budget {budget}, {gigabytes:g} GB/s, against {how}: {fewer:.1f} times fewer copies "
                    f"({verdict(fewer, 4)}), p99.9 TBT {better:.1f} times better ({verdict(better, 2)}), of the "
                    f"undisplaced {steadier:.1f} ({verdict(steadier, 2)})"
                )
    print(aligned(rows))
    print("\n".join(verdicts))


def verdict(found: float, bar: float) -> str:
    return f"bar {bar:g}: {'met' if found >= bar else 'missed'}"


if __name__ == "__main__":
    main()
