"""Does the simulator predict this engine? Profiles it, then plays traces into it and compares what was predicted.

    python benchmarks/simulator_calibration.py [--seconds 20] [--rounds 2] [--profile here.json] [--json out.json]

For each trace and policy: the mean duration of a step and the p99 and mean job completion time, simulated with the
profile and measured in the engine on the same arrivals (this thread runs the engine's loop: no client is timed). Then
the policies' order by mean completion time, simulated and measured. Bars: step within 10 %, p99 JCT within 20 %, same
order (policies whose measured means differ by less than 5 % count as equal). Use a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engines import Engine, percent, predict

from jaxserve.cli.player import CLOCKS
from jaxserve.cli.profile import measure
from jaxserve.config import EngineConfig
from jaxserve.engine.platform import select_platform
from jaxserve.sim import traces
from jaxserve.sim.profile import read_profile, write_profile
from jaxserve.sim.report import aligned
from jaxserve.sim.sweep import PolicySpec, Setting, capacity
from jaxserve.sim.workload import poisson, sample

TRACES = {"azure-conv": 0.25, "heavy-tail": 0.5, "agents": 0.25}
"""Name and factor for lengths: the bundled model has 4,096 positions."""
POLICIES = ("sarathi", "fcfs", "static", "mlfq", "srpt")
TIE = 0.05


def order(means: dict[str, float]) -> list[str]:
    return sorted(means, key=lambda name: means[name])


def same_order(predicted: dict[str, float], measured: dict[str, float]) -> bool:
    """Whether every pair that the engine tells apart is in the predicted order."""
    return all(
        (predicted[a] < predicted[b]) == (measured[a] < measured[b])
        for a in measured
        for b in measured
        if a < b and abs(measured[a] / measured[b] - 1) > TIE
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a run (default 20)")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=2, help="of the profile's grid (default 2)")
    parser.add_argument("--profile", type=Path, help="use this profile, or write it there")
    parser.add_argument("--policy", nargs="+", default=POLICIES)
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
    policies = [PolicySpec.parse(text) for text in args.policy]
    if args.profile is not None and args.profile.exists():
        profile = read_profile(args.profile)
    else:
        profile = measure(
            EngineConfig.of(**options), args.rounds, say=lambda text: print(text, file=sys.stderr), clock=args.clock
        )
        if args.profile is not None:
            write_profile(profile, args.profile)
    machine = profile.machine()
    engines = {policy.text: Engine(options, policy, args.clock) for policy in policies}
    rows, results, orders = [["trace, policy", "step ms", "sim", "p99 JCT s", "sim", "mean JCT s", "sim"]], [], []
    for name, factor in TRACES.items():
        trace = traces.load(name).shrunk(factor)
        rate = args.load * capacity(Setting(trace=trace, machine=machine, jobs=100, arrivals="poisson"))
        arrivals = sample(trace, max(20, round(rate * args.seconds)), rate, 0, poisson)
        means: tuple[dict[str, float], dict[str, float]] = ({}, {})
        for policy in policies:
            predicted, measured = predict(machine, policy, arrivals), engines[policy.text].play(arrivals)
            cells = [f"{1e3 * measured['step_mean_s']:.2f}", percent(predicted, measured, "step_mean_s")]
            for figure in ("jct_p99_s", "jct_mean_s"):
                cells += [f"{measured[figure]:.2f}", percent(predicted, measured, figure)]
            rows.append([f"{name}, {policy.text}", *cells])
            print(aligned([rows[0], rows[-1]]), file=sys.stderr, flush=True)
            results.append({"trace": name, "policy": policy.text, "measured": measured, "predicted": predicted})
            means[0][policy.text], means[1][policy.text] = predicted["jct_mean_s"], measured["jct_mean_s"]
        verdict = "same order" if same_order(*means) else "another order"
        orders.append(f"{name}: {verdict}; predicted {order(means[0])}, measured {order(means[1])}")
    print(aligned(rows))
    print("\n".join(orders))
    if args.json is not None:
        args.json.write_text(
            json.dumps({"about": profile.about, "results": results, "orders": orders}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
