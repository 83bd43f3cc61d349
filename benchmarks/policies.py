"""What scheduling policies gain: the engine's own scheduler in virtual time, on an A100's published cost.

    python benchmarks/policies.py                    # every case: about an hour
    python benchmarks/policies.py deadlines
    python benchmarks/policies.py heavy-tail --seeds 2 --requests 500              # a quick look

Every case compares policies on the same arrivals and prints ratios to `fcfs` (above 1 is better) with 95 % intervals
over seeds. Load 1.0 is the machine's capacity for the trace under sarathi.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Sequence

from jaxserve.sim import traces
from jaxserve.sim.machine import published
from jaxserve.sim.metrics import SLO, shares
from jaxserve.sim.sweep import PolicySpec, Setting, capacity, sweep
from jaxserve.sim.workload import Trace, poisson, sample, together

T95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""Student's t for a mean of so many values."""


def interval(values: Sequence[float]) -> str:
    """Mean and half width of its 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    return f"{mean:.2f} ±{T95.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def against_fcfs(
    trace: Trace, slots: int, names: Sequence[str], loads: Sequence[float], args: argparse.Namespace
) -> None:
    """Mean and p99 of job times, as ratios to fcfs seed by seed."""
    setting = Setting(
        trace=trace,
        machine=published(max_num_seqs=slots),
        jobs=args.requests,
        arrivals="poisson",
        max_tokens=max(turn.output for turn in trace.turns),
    )
    unit = capacity(setting)
    specs = [PolicySpec.parse(name) for name in ("fcfs", *names)]
    print(f"{trace.name}: {slots} slots, {args.requests} jobs, {args.seeds} seeds, load 1.0 is {unit:.2f} jobs/s")
    print(f"{'load':>5} {'policy':12} {'mean JCT s':>16} {'gain in mean':>14} {'gain in p99':>14} {'preempted':>12}")
    for load in loads:
        base: Sequence[dict[str, float]] = ()
        for cell in sweep(setting, specs, [load], args.seeds, unit):
            base = base or cell.runs
            gains = [
                [one[name] / other[name] for one, other in zip(base, cell.runs, strict=True)]
                for name in ("jct_mean_s", "jct_p99_s")
            ]
            mean = interval([run["jct_mean_s"] for run in cell.runs])
            preempted = interval([run.get("preemptions", 0.0) for run in cell.runs])
            mean_gain, p99_gain = map(interval, gains)
            print(f"{load:5} {cell.policy:12} {mean:>16} {mean_gain:>14} {p99_gain:>14} {preempted:>12}")


def heavy_tail(args: argparse.Namespace) -> None:
    against_fcfs(traces.load("heavy-tail"), 16, ("sarathi", "mlfq", "srpt"), (0.5, 0.8, 1.0, 1.2), args)


def light_tail(args: argparse.Namespace) -> None:
    against_fcfs(traces.load("azure-conv"), 16, ("sarathi", "mlfq"), (0.5, 0.8, 1.0, 1.2), args)


def agents(args: argparse.Namespace) -> None:
    few = argparse.Namespace(**{**vars(args), "requests": max(20, args.requests // 8)})
    against_fcfs(traces.load("agents"), 64, ("sarathi", "continuum"), (0.5, 0.8, 1.0, 1.2), few)


def offline(args: argparse.Namespace) -> None:
    """A job that is all there at once: time to its end, and prompt tokens computed."""
    trace = traces.load("shared-prefix")
    print(f"{trace.name}: {len(trace.jobs)} requests, all at once")
    print(f"{'policy':12} {'makespan s':>12} {'prefilled':>12} {'saved':>8} {'of what the tree saves':>24}")
    prompts = sum(job.turns[0].prompt for job in trace.jobs)
    optimum = 0
    for name in ("batchllm", "fcfs", "sarathi"):
        setting = Setting(trace=trace, machine=published(), jobs=len(trace.jobs), arrivals="poisson")
        spec = PolicySpec.parse(name)
        simulation = setting.simulation(spec, sample(trace, len(trace.jobs), 1e6, 0, lambda draw: 0.0))
        run = simulation.run()
        if name == "batchllm":
            policy = simulation._replicas[0].scheduler.policy
            optimum = policy.optimum  # type: ignore[attr-defined]
        saved = prompts - run.totals["prefill_tokens"]
        share = saved / (prompts - optimum)
        end = max(one.finish for one in run.served)
        print(f"{name:12} {end:12.1f} {run.totals['prefill_tokens']:12.0f} {saved / prompts:8.1%} {share:24.3f}")


def fairness(args: argparse.Namespace) -> None:
    """One tenant floods the engine, another asks for a little more than half of it: what it gets."""
    trace = traces.load("azure-conv")
    machine = published(max_num_seqs=16)
    setting = Setting(trace=trace, machine=machine, jobs=args.requests, arrivals="poisson")
    unit = capacity(setting)
    print(f"{trace.name}: 'flood' sends three times the capacity, 'calm' 0.6 of it; {args.seeds} seeds")
    print(f"{'policy':12} {'share of calm':>16} {'mean JCT of calm s':>20}")
    for name in ("fcfs", "sarathi", "fairness"):
        parts, times = [], []
        for seed in range(args.seeds):
            flood = sample(trace, args.requests, 3 * unit, seed, poisson)
            calm = sample(trace, args.requests // 5, 0.6 * unit, seed + 100, poisson)
            mixed = together("mixed", {"flood": flood, "calm": calm})
            served = setting.simulation(PolicySpec.parse(name), mixed).run().served
            parts.append(shares(served)["calm"])
            times.append(statistics.fmean(one.latency for one in served if one.tenant == "calm"))
        print(f"{name:12} {interval(parts):>16} {interval(times):>20}")


def deadlines(args: argparse.Namespace) -> None:
    """Every request has one: some seconds to its first token and 0.1 s a token. The share that is complete in time."""
    trace = traces.load("azure-conv")
    longest = max(turn.output for turn in trace.turns)
    base = Setting(trace=trace, machine=published(), jobs=args.requests, arrivals="poisson", max_tokens=longest)
    unit = capacity(base)
    names = ("fcfs", "sarathi", "urgency")
    print(f"{trace.name}: {args.requests} requests, {args.seeds} seeds; deadline: arrival + X + 0.1 s a token")
    print(f"{'load':>5} {'X':>5} " + " ".join(f"{name:>16}" for name in names))
    for load in (0.8, 1.0, 1.2):
        for seconds in (5.0, 20.0):
            slo = SLO(ttft=seconds, tpot=0.1)
            setting = dataclasses.replace(base, slo=slo)
            shares = []
            for name in names:
                runs = [setting.run(PolicySpec.parse(name), load * unit, seed).served for seed in range(args.seeds)]
                met = [[one.finish <= slo.deadline(one.arrival, one.output) for one in served] for served in runs]
                shares.append(interval([statistics.fmean(one) for one in met]))
            print(f"{load:5} {seconds:5g} " + " ".join(f"{share:>16}" for share in shares), flush=True)


def run_length(args: argparse.Namespace) -> None:
    """The gain on a heavy tail depends on how long one looks: at load 1.0 the queue of `fcfs` grows all the time."""
    trace = traces.load("heavy-tail")
    machine = published(max_num_seqs=16)
    longest = max(turn.output for turn in trace.turns)
    base = Setting(trace=trace, machine=machine, jobs=args.requests, arrivals="poisson", max_tokens=longest)
    unit = capacity(base)
    print(f"{trace.name}: 16 slots, {args.seeds} seeds; gain of mlfq over fcfs in mean (p99) job completion time")
    loads, lengths = (0.9, 1.0), (300, 600, 1000, 2000, 4000)
    print(f"{'jobs':>6} {'hours at 1.0':>13} " + " ".join(f"{f'load {load:g}':>28}" for load in loads))
    for jobs in lengths:
        setting, texts = dataclasses.replace(base, jobs=jobs), []
        for load in loads:
            specs = [PolicySpec.parse(name) for name in ("fcfs", "mlfq")]
            plain, queues = (cell.runs for cell in sweep(setting, specs, [load], args.seeds, unit))
            mean, p99 = (
                interval([one[name] / other[name] for one, other in zip(plain, queues, strict=True)])
                for name in ("jct_mean_s", "jct_p99_s")
            )
            texts.append(f"{mean} ({p99})")
        print(f"{jobs:6} {jobs / unit / 3600:13.2f} " + " ".join(f"{text:>28}" for text in texts), flush=True)


CASES = {
    "heavy-tail": heavy_tail,
    "light-tail": light_tail,
    "agents": agents,
    "offline": offline,
    "fairness": fairness,
    "deadlines": deadlines,
    "run-length": run_length,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=list(CASES), help="Default: all.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    for case in [args.case] if args.case else CASES:
        CASES[case](args)
        print(flush=True)


if __name__ == "__main__":
    main()
