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
import statistics
import sys
import tempfile
from pathlib import Path

from jaxserve.cli.player import TracePlayer
from jaxserve.cli.profile import measure
from jaxserve.config import EngineConfig
from jaxserve.engine.load import load_core
from jaxserve.engine.platform import select_platform
from jaxserve.engine.shapes import EngineShape
from jaxserve.scheduler import make_policy, policy_names
from jaxserve.sim import traces
from jaxserve.sim.machine import Machine
from jaxserve.sim.metrics import figures
from jaxserve.sim.profile import read_profile, timed_steps, write_profile
from jaxserve.sim.report import aligned
from jaxserve.sim.simulation import Simulation
from jaxserve.sim.sweep import Setting, capacity
from jaxserve.sim.workload import Trace, poisson, sample

TRACES = {"azure-conv": 0.25, "heavy-tail": 0.5, "agents": 0.25}
"""Name and factor for lengths: the bundled model has 4,096 positions."""
POLICIES = ("sarathi", "fcfs", "static", "priority", "mlfq")
TIE = 0.05


def play(options: dict, policy: str, trace: Trace) -> dict[str, float]:
    """What the engine does on the trace."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        player = TracePlayer()
        config = EngineConfig.of(**options, scheduling_policy=policy, record=str(record), wait_for_buckets=True)
        core = load_core(config, player, player.emit, lambda _: None)
        shape = EngineShape.of(config, core.ready.limits.max_model_len, on_gpu=False)
        player.play(core, sample(trace, 4, 100.0, 1, poisson).jobs)  # the first steps of a process are slow
        warm = len(timed_steps(record.read_bytes(), shape, warm_up=0))
        run = player.play(core, trace.jobs)
        core.close()
        steps = timed_steps(record.read_bytes(), shape, warm_up=0)[warm:]
    return {**figures(run), "step_mean_s": statistics.fmean(timed.seconds for timed in steps), "steps": len(steps)}


def predict(machine: Machine, policy: str, trace: Trace) -> dict[str, float]:
    run = Simulation(trace, machine, lambda: make_policy(policy)).run()
    return {**figures(run), "step_mean_s": run.busy_s / run.steps, "steps": run.steps}


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
    parser.add_argument("--policy", nargs="+", help="default: those of five that exist")
    parser.add_argument("--json", type=Path)
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
    policies = args.policy or [name for name in POLICIES if name in policy_names()]
    if args.profile is not None and args.profile.exists():
        profile = read_profile(args.profile)
    else:
        profile = measure(EngineConfig.of(**options), args.rounds, say=lambda text: print(text, file=sys.stderr))
        if args.profile is not None:
            write_profile(profile, args.profile)
    machine = profile.machine()
    results, rows = [], [["trace, policy", "step ms", "predicted", "p99 JCT s", "predicted", "mean JCT s", "predicted"]]
    for name, factor in TRACES.items():
        trace = traces.load(name).shrunk(factor)
        rate = args.load * capacity(Setting(trace=trace, machine=machine, jobs=100, arrivals="poisson"))
        arrivals = sample(trace, max(20, round(rate * args.seconds)), rate, 0, poisson)
        predicted = {policy: predict(machine, policy, arrivals) for policy in policies}
        measured = {}
        for policy in policies:
            measured[policy] = play(options, policy, arrivals)
            m, p = measured[policy], predicted[policy]
            cells = [f"{1e3 * m['step_mean_s']:.2f}", percent(p, m, "step_mean_s")]
            for figure in ("jct_p99_s", "jct_mean_s"):
                cells += [f"{m[figure]:.2f}", percent(p, m, figure)]
            rows.append([f"{name}, {policy}", *cells])
            print(aligned([rows[0], rows[-1]]), file=sys.stderr)
            results.append({"trace": name, "policy": policy, "measured": m, "predicted": p})
        jct = [{policy: made[policy]["jct_mean_s"] for policy in policies} for made in (predicted, measured)]
        verdict = "same order" if same_order(*jct) else "other order"
        results.append({"trace": name, "predicted": order(jct[0]), "measured": order(jct[1]), "verdict": verdict})
    print(aligned(rows))
    for one in results:
        if "verdict" in one:
            print(f"{one['trace']}: {one['verdict']}; predicted {one['predicted']}, measured {one['measured']}")
    if args.json is not None:
        args.json.write_text(json.dumps({"about": profile.about, "results": results}, indent=1) + "\n")


def percent(predicted: dict[str, float], measured: dict[str, float], name: str) -> str:
    return f"{100 * (predicted[name] / measured[name] - 1):+.0f}%"


if __name__ == "__main__":
    main()
