"""Does the simulator predict this engine? Profiles it, then plays traces into it and compares what was predicted.

    python benchmarks/simulator_calibration.py --json out.json          # thirteen minutes of a machine to itself
    python benchmarks/simulator_calibration.py --seconds 3 --rounds 1     # does it run?

For each trace and policy: the mean duration of a step and the p99 and mean job completion time, simulated with the
profile and measured in the engine on the same arrivals (this thread runs the engine's loop: no client is timed). Bars:
step within 10 %, p99 within 20 %, and the same order of the policies by mean completion time.

Near saturation a percent of price is two of the mean step and five of a completion time, and a machine that shares its
hardware is a tenth slower or faster from one run to the next. So a metronome (cli/metronome.py) goes while the profile
is taken and during every run: a small engine serves the same two requests while the clock of the other stands still.
By how much they take longer than in the profile is the `pace` of a run, and prices go with it. Nothing of it comes from
the steps that are predicted; what these say themselves is the column `own`: what they took by the profile's prices.

Order: one run cannot tell all policies apart. Two of them differ where the difference of their completion times, job by
job, has a 95 % interval without zero, by the method of batch means (ten groups of consecutive jobs: neighbours share
their fate), and is more than 2 %. Those pairs must be in the predicted order; the others are ties, and counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from engines import Engine, Played, fitting, predict, profile_at
from msgspec import structs

from jaxserve.cli.player import CLOCKS
from jaxserve.engine.platform import select_platform
from jaxserve.sim import traces
from jaxserve.sim.cost import CostModel
from jaxserve.sim.profile import Timed
from jaxserve.sim.report import aligned
from jaxserve.sim.sweep import PolicySpec, Setting, capacity
from jaxserve.sim.workload import poisson, sample

TRACES = {"azure-conv": 0.25, "heavy-tail": 0.5, "agents": 0.25}
"""Name and factor for lengths: the bundled model has 4,096 positions."""
POLICIES = ("sarathi", "fcfs", "static", "mlfq", "srpt")
STEP_BAR, P99_BAR = 0.10, 0.20
BATCHES = 10
T95 = 2.26
"""Student's t for the mean of so many batches."""
LEAST = 0.02
"""Differences below this share are ties, however sure."""


def told_apart(a: Sequence[float], b: Sequence[float]) -> int:
    """-1, 0 or 1: whether jobs under `a` take less, as much or more time than under `b`, as far as one can tell."""
    differences = [one - other for one, other in zip(a, b, strict=True)]
    size = len(differences) // BATCHES
    if size < 1:
        return 0
    batches = [statistics.fmean(differences[i * size : (i + 1) * size]) for i in range(BATCHES)]
    mean, half = statistics.fmean(batches), T95 * statistics.stdev(batches) / BATCHES**0.5
    if abs(mean) <= max(half, LEAST * min(statistics.fmean(a), statistics.fmean(b))):
        return 0
    return 1 if mean > 0 else -1


def verdict_on_order(predicted: Mapping[str, Played], measured: Mapping[str, Played]) -> str:
    told = wrong = 0
    found = []
    for a, b in combinations(measured, 2):
        sign = told_apart(measured[a].jobs, measured[b].jobs)
        means = [statistics.fmean(predicted[name].jobs) for name in (a, b)]
        told += sign != 0
        if sign * (means[0] - means[1]) < 0:
            wrong += 1
            found.append(f"{a} and {b}")
    pairs = len(measured) * (len(measured) - 1) // 2
    met = "met" if not wrong else f"missed: {', '.join(found)}"
    return f"{told} of {pairs} pairs told apart, {told - wrong} of them in the predicted order ({met})"


def order(played: Mapping[str, Played]) -> str:
    means = {name: statistics.fmean(one.jobs) for name, one in played.items()}
    return " < ".join(f"{name} {means[name]:.2f}" for name in sorted(means, key=lambda name: means[name]))


def off(predicted: Played, measured: Played, name: str) -> float:
    return predicted.figures[name] / measured.figures[name] - 1


def cells(predicted: Played, measured: Played) -> Iterator[str]:
    for name, scale, bar in (("step_mean_s", 1e3, STEP_BAR), ("jct_p99_s", 1.0, P99_BAR), ("jct_mean_s", 1.0, None)):
        error = off(predicted, measured, name)
        mark = "" if bar is None else " met" if abs(error) <= bar else " MISSED"
        yield f"{measured.figures[name] * scale:.2f}"
        yield f"{error:+.0%}{mark}"


def price_level(steps: Sequence[Timed], cost: CostModel) -> float:
    """What the steps took, by what the profile says of them."""
    return sum(one.seconds for one in steps) / sum(cost.step_s(one.step) for one in steps)


def prices(steps: Sequence[Timed], cost: CostModel) -> list[list[str]]:
    """What the profile says of the very steps that the engine made: errors here are not those of the schedule."""
    rows = [["rows, tiles", "steps", "share of time", "measured ms", "simulated"]]
    buckets: dict[tuple[int, int], list[Timed]] = {}
    for timed in steps:
        buckets.setdefault(timed.step.bucket, []).append(timed)
    total = sum(timed.seconds for timed in steps)
    for bucket, group in sorted(buckets.items()):
        measured, predicted = sum(one.seconds for one in group), sum(cost.step_s(one.step) for one in group)
        share, mean = measured / total, 1e3 * measured / len(group)
        rows.append([f"{bucket}", f"{len(group)}", f"{share:.0%}", f"{mean:.2f}", f"{predicted / measured - 1:+.0%}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a run (default 20)")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=5, help="of the profile's grid (default 5)")
    parser.add_argument("--profile", type=Path, help="use this profile, or write it there")
    parser.add_argument("--policy", nargs="+", default=POLICIES)
    parser.add_argument("--trace", nargs="+", default=list(TRACES), choices=list(TRACES))
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="work: processor time, for machines that others use (see player.py)",
    )
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--kv-cache-memory", default="128MiB")
    args = parser.parse_args()
    select_platform("cpu")
    options = {
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": 256,
        "max_model_len": 2048,
        "kv_cache_memory": args.kv_cache_memory,
    }
    profile = profile_at(args.profile, options, args.rounds, args.clock)
    machine = profile.machine()
    policies = [PolicySpec.parse(text) for text in args.policy]
    engines = {policy.text: Engine(options, policy, args.clock) for policy in policies}
    head = ["trace, policy", "pace", "own", "step ms", "simulated", "p99 JCT s", "simulated", "mean JCT s", "simulated"]
    rows, results, verdicts = [head], [], []
    steps: list[Timed] = []
    for name in args.trace:
        trace = fitting(traces.load(name).shrunk(TRACES[name]), machine)
        rate = args.load * capacity(Setting(trace=trace, machine=machine, jobs=100, arrivals="poisson"))
        arrivals = sample(trace, max(2 * BATCHES, round(rate * args.seconds)), rate, 0, poisson)
        predicted: dict[str, Played] = {}
        measured: dict[str, Played] = {}
        for policy in policies:
            measured[policy.text] = played = engines[policy.text].play(arrivals)
            pace, own = played.beat_s / profile.beat_s, price_level(played.timed, machine.cost)
            predicted[policy.text] = predict(machine, policy, arrivals, pace)
            steps.extend(structs.replace(one, seconds=one.seconds / pace) for one in played.timed)
            figures = cells(predicted[policy.text], measured[policy.text])
            rows.append([f"{name}, {policy.text}", f"{pace:.2f}", f"{own:.2f}", *figures])
            print(aligned([rows[0], rows[-1]]), file=sys.stderr, flush=True)
            both = {"measured": measured[policy.text].figures, "predicted": predicted[policy.text].figures}
            results.append({"trace": name, "policy": policy.text, "pace": pace, "own": own, **both})
        verdicts.append(f"{name}, {len(arrivals.jobs)} jobs: {verdict_on_order(predicted, measured)}")
        verdicts.append(f"  simulated {order(predicted)}\n  measured  {order(measured)}")
    print(aligned(rows))
    print("\n".join(verdicts))
    print("all steps of the engine, at the pace of the profile, and what that says of each:")
    print(aligned(prices(steps, machine.cost)))
    flat = [cell for row in rows for cell in row]
    print(f"bars: {sum('met' in cell for cell in flat)} met, {sum('MISSED' in cell for cell in flat)} missed")
    if args.json is not None:
        report = {"about": profile.about, "results": results, "verdicts": verdicts}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
