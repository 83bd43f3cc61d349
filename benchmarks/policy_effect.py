"""Do policies gain in the engine what the simulator promises? Two policies in turn (A B A B) on the same arrivals.

    python benchmarks/policy_effect.py --json out.json        # all: eleven minutes of a machine that does only this
    python benchmarks/policy_effect.py --case heavy-tail --rounds 4
    python benchmarks/policy_effect.py --share 0.2 --rounds 1    # does it run?

Both are played in the engine with the bundled model and simulated with a profile of it (taken first where --profiles
has none), on the same arrivals and seeds. Gain: the baseline's figure by the policy's, less 1. Bar: half of the gain
that the simulation promises; where that promises less than 5 %, there is nothing to confirm.

A case is a number of jobs at a load of the machine, not seconds: an engine that is twice as fast gets the same queue.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from engines import Engine, fitting, predict, profile_at

from jaxserve.cli.player import CLOCKS
from jaxserve.engine.platform import select_platform
from jaxserve.sim import traces
from jaxserve.sim.machine import Machine
from jaxserve.sim.profile import Profile
from jaxserve.sim.report import aligned
from jaxserve.sim.sweep import PolicySpec, Setting, capacity
from jaxserve.sim.workload import Trace, poisson, sample, together

BAR = 0.5
NOTHING = 0.05
COMMON = {"max_num_batched_tokens": 256, "max_model_len": 2048}
OPTIONS = {
    "4": {"max_num_seqs": 4, "kv_cache_memory": "24MiB", **COMMON},
    "16": {"max_num_seqs": 16, "kv_cache_memory": "128MiB", **COMMON},
    "crowded": {"max_num_seqs": 16, "kv_cache_memory": "24MiB", **COMMON},
}
"""Engines: four and sixteen slots with what so many sequences need at most; sixteen that share the memory of four."""


@dataclass(frozen=True)
class Case:
    """`load`: None for all at once. `scale`: of lengths, for a model with 4,096 positions."""

    trace: str
    policy: str
    figure: str
    jobs: int
    load: float | None = 1.0
    baseline: str = "fcfs"
    scale: float = 1.0
    engine: str = "4"
    flood: float = 0.0
    """Load that another tenant, `flood`, sends beside that of `calm`, for as long."""

    def arrivals(self, machine: Machine, share: float, seed: int) -> Trace:
        trace = fitting(traces.load(self.trace).shrunk(self.scale), machine)
        jobs = max(20, round(share * self.jobs))
        if self.load is None:
            return sample(trace, jobs, 1e6, seed, lambda draw: 0.0)
        unit = capacity(Setting(trace=trace, machine=machine, jobs=100, arrivals="poisson"))
        calm = sample(trace, jobs, self.load * unit, seed, poisson)
        if not self.flood:
            return calm
        flood = sample(trace, round(jobs * self.flood / self.load), self.flood * unit, seed + 100, poisson)
        return together(trace.name, {"flood": flood, "calm": calm})


CASES = {
    # Above capacity, and long enough to have a queue. Sixteen slots: who sinks needs memory while others pass.
    "heavy-tail": Case("heavy-tail", "mlfq", "jct_mean_s", jobs=800, load=1.2, scale=0.5, engine="16"),
    "documents": Case("long-prompts", "sarathi", "tbt_p99_s", jobs=120, load=0.8, scale=0.15),
    # Contexts of some ten sessions are what memory holds, there are slots for more, and tools are quick. Whoever lets
    # all of them take turns loses what he has computed; with four slots few are under way, and little is lost.
    "agents": Case(
        "agents:jobs=200,turns=uniform/4/8,think_s=0.3,prefix=600,groups=200,prompt=lognormal/100/0.5/400,"
        "output=lognormal/8/0.5/64",
        "continuum",
        "jct_mean_s",
        jobs=60,
        load=1.2,
        engine="crowded",
    ),
    # A tenant that sends three times what the machine can do, beside one that asks for a little more than half of it.
    "tenants": Case(
        "azure-conv", "fairness", "latency_mean_calm_s", jobs=40, load=0.6, scale=0.5, engine="16", flood=3.0
    ),
    # Prefixes of 15,000 tokens together, more than the cache holds.
    "offline": Case(
        "shared-prefix:jobs=100,groups=15,prefix=1000,prompt=lognormal/50/0.5/200,output=lognormal/16/0.5/64",
        "batchllm",
        "makespan_s",
        jobs=100,
        load=None,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES), help="default: all")
    parser.add_argument("--share", type=float, default=1.0, help="of each case's jobs (default 1)")
    parser.add_argument("--rounds", type=int, default=2, help="seeds: each is run under both policies (default 2)")
    parser.add_argument("--profiles", type=Path, metavar="FOLDER", help="use ENGINE.json in it, or write it there")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="work: processor time, for machines that others use (see player.py)",
    )
    args = parser.parse_args()
    select_platform("cpu")
    if args.profiles is not None:
        args.profiles.mkdir(parents=True, exist_ok=True)
    profiles: dict[str, Profile] = {}
    engines: dict[tuple[str, str], Engine] = {}
    rows, runs = [["case", "figure", "engine", "", "simulated", "", "gain in engine", "simulated", "share", "bar"]], []
    for name in args.case:
        case = CASES[name]
        kind, options = case.engine, OPTIONS[case.engine]
        if kind not in profiles:
            path = args.profiles / f"{kind}.json" if args.profiles is not None else None
            profiles[kind] = profile_at(path, options, 5, args.clock)
        machine = profiles[kind].machine()
        specs = [PolicySpec.parse(text) for text in (case.baseline, case.policy)]
        for spec in specs:
            if (spec.text, kind) not in engines:
                engines[spec.text, kind] = Engine(options, spec, args.clock)
        found: list[list[float]] = []
        for seed in range(args.rounds):
            arrivals = case.arrivals(machine, args.share, seed)
            print(f"{name}, round {seed + 1}: {len(arrivals.jobs)} jobs", file=sys.stderr, flush=True)
            played = [engines[spec.text, kind].play(arrivals) for spec in specs]
            paces = [one.beat_s / profiles[kind].beat_s for one in played]
            promised = [predict(machine, spec, arrivals, pace) for spec, pace in zip(specs, paces, strict=True)]
            found.append([one.figures[case.figure] for one in (*played, *promised)])
            runs.append(
                {
                    "case": name,
                    "seed": seed,
                    "policies": [spec.text for spec in specs],
                    "paces": paces,
                    "measured": [one.figures for one in played],
                    "predicted": [one.figures for one in promised],
                }
            )
        rows.append([name, case.figure, *summary(found)])
        print(aligned([rows[0], rows[-1]]), file=sys.stderr, flush=True)
    print(aligned(rows))
    if args.json is not None:
        args.json.write_text(json.dumps({"table": rows, "runs": runs}, indent=1) + "\n")


def summary(found: list[list[float]]) -> list[str]:
    """From (baseline, policy) measured and simulated, by round: means, gains (geometric over rounds), verdict."""
    means = [statistics.fmean(values) for values in zip(*found, strict=True)]
    gained = statistics.geometric_mean([one[0] / one[1] for one in found]) - 1
    promised = statistics.geometric_mean([one[2] / one[3] for one in found]) - 1
    if promised < NOTHING:
        share, verdict = "", "nothing promised"
    else:
        share, verdict = f"{gained / promised:.2f}", "met" if gained >= BAR * promised else "MISSED"
    return [*(f"{mean:.3f}" for mean in means), f"{gained:+.2f}", f"{promised:+.2f}", share, verdict]


if __name__ == "__main__":
    main()
