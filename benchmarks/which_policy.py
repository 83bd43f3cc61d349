"""Which policy for which load: every policy on three traces, at half load and at capacity.

    python benchmarks/which_policy.py                         # about five minutes on one core; --workers 2 halves it
    python benchmarks/which_policy.py --jobs 200 --seeds 2    # a quick look

Each cell is the gain over `fcfs` in mean / p99 job completion time on the same arrivals (above 1 is better), the mean
over seeds, in virtual time on an A100's published cost. Bar: at half load no policy loses more than 3 % of the mean,
except those whose page says so. The table is Markdown, for docs/techniques/which-policy.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from jaxserve.scheduler import policy_names
from jaxserve.sim import traces
from jaxserve.sim.machine import published
from jaxserve.sim.sweep import Cell, PolicySpec, Setting, capacity, sweep

BAR = 0.97
SAY_SO = ("static",)
"""The baseline without continuous batching loses at any load (docs/techniques/which-policy.md)."""


@dataclass(frozen=True)
class Workload:
    name: str
    trace: str
    slots: int
    busy: float
    """The load beside 0.5."""
    share: float = 1.0
    """Of --jobs: a session is several requests."""

    def setting(self, jobs: int) -> Setting:
        trace = traces.load(self.trace)
        return Setting(
            trace=trace,
            machine=published(max_num_seqs=self.slots),
            jobs=max(20, round(jobs * self.share)),
            arrivals="poisson",
            max_tokens=max(turn.output for turn in trace.turns),
        )


WORKLOADS = (
    Workload("answers of 1 to 2,048 tokens", "heavy-tail", 16, 1.0),
    Workload("conversations", "azure-conv", 64, 1.0),
    Workload("agents", "agents", 64, 1.2, share=0.2),
)


def gain(cell: Cell, base: Cell, figure: str) -> float:
    """Over seeds, of how many times smaller the figure is."""
    return statistics.fmean(one[figure] / other[figure] for one, other in zip(base.runs, cell.runs, strict=True))


def cells(workload: Workload, args: argparse.Namespace) -> Iterator[tuple[float, str, float, float]]:
    """(load, policy, gain in mean, gain in p99)"""
    setting = workload.setting(args.jobs)
    unit = capacity(setting)
    specs = [PolicySpec.parse(name) for name in ("fcfs", *(name for name in args.policies if name != "fcfs"))]
    base: dict[float, Cell] = {}
    for cell in sweep(setting, specs, (0.5, workload.busy), args.seeds, unit, args.workers, progress):
        reference = base.setdefault(cell.load, cell)
        yield cell.load, cell.policy, gain(cell, reference, "jct_mean_s"), gain(cell, reference, "jct_p99_s")


def progress(done: int, of: int) -> None:
    print(f"\r{done}/{of} runs", end="\n" if done == of else "", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--policies", nargs="+", default=policy_names(), help="default: all; wrappers: outer+inner")
    args = parser.parse_args()
    columns = [(workload, load) for workload in WORKLOADS for load in (0.5, workload.busy)]
    table: dict[str, dict[tuple[str, float], tuple[float, float]]] = {}
    for workload in WORKLOADS:
        for load, policy, mean, p99 in cells(workload, args):
            table.setdefault(policy, {})[workload.name, load] = mean, p99
    best = {(w.name, load): max(row[w.name, load][0] for row in table.values()) for w, load in columns}
    print("| | " + " | ".join(f"{workload.name}, load {load:g}" for workload, load in columns) + " | half load |")
    print("|---|" + "---:|" * len(columns) + "---|")
    for policy, row in table.items():
        texts = []
        for workload, load in columns:
            mean, p99 = row[workload.name, load]
            text = f"{mean:.2f} / {p99:.2f}"
            texts.append(f"**{text}**" if mean > 0.99 * best[workload.name, load] else text)
        least = min(row[workload.name, 0.5][0] for workload in WORKLOADS)
        met = "met" if least >= BAR else f"{least:.2f}, page says so" if policy in SAY_SO else f"missed: {least:.2f}"
        print(f"| `{policy}` | " + " | ".join(texts) + f" | {met} |")


if __name__ == "__main__":
    main()
