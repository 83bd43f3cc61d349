"""How fast the simulator is: requests a second, by policy, on one core.

    python benchmarks/simulator_speed.py [--requests 100000] [--policy sarathi fcfs] [--trace azure-conv] [--load 1.0]

Takes the lengths of the trace (the package's sample of Azure 2023 conversations, or the file you name), arrivals at the
load asked for, and OPT-13B on an A100. Wall time and processor time are both shown: on a busy machine they differ.
"""

from __future__ import annotations

import argparse
import time

from jaxserve.scheduler import policy_names
from jaxserve.sim import traces
from jaxserve.sim.machine import published
from jaxserve.sim.sweep import PolicySpec, Setting, capacity
from jaxserve.sim.workload import poisson, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--policy", nargs="+", default=[name for name in ("sarathi", "mlfq") if name in policy_names()])
    parser.add_argument("--trace", default="azure-conv")
    parser.add_argument("--load", type=float, default=1.0)
    args = parser.parse_args()
    trace = traces.load(args.trace)
    setting = Setting(
        trace=trace,
        machine=published(max_model_len=trace.longest),
        jobs=args.requests,
        arrivals="poisson",
        max_tokens=max(turn.output for turn in trace.turns),
    )
    rate = args.load * capacity(setting)
    arrivals = sample(trace, args.requests, rate, 0, poisson)
    print(f"{args.requests:,} requests of {args.trace} at load {args.load:g} ({rate:.2f}/s)")
    print(f"{'policy':16} {'wall s':>8} {'CPU s':>8} {'steps':>10} {'tokens':>12} {'us/token':>9} {'simulated h':>12}")
    for name in args.policy:
        simulation = setting.simulation(PolicySpec.parse(name), arrivals)
        wall, cpu = time.perf_counter(), time.process_time()
        run = simulation.run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        tokens = sum(one.output for one in run.served)
        hours = max(one.finish for one in run.served) / 3600
        print(
            f"{name:16} {wall:8.1f} {cpu:8.1f} {run.steps:10,} {tokens:12,} {1e6 * cpu / tokens:9.2f} {hours:12.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
