"""Does a policy gain in the engine what the simulator promises? Two policies in turn (A B A B) on the same arrivals.

    python benchmarks/policy_effect.py --trace heavy-tail --policy fcfs mlfq --profile here.json --rounds 2
    python benchmarks/policy_effect.py --trace agents --scale-lengths 0.25 --policy fcfs continuum --load 1.2

The profile is taken first if the file is not there. Gain: the first policy's figure by the second's (mean job
completion time unless --figure names another), less 1. Bar: half of the gain that was predicted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from engines import Engine, predict

from jaxserve.cli.player import CLOCKS
from jaxserve.cli.profile import measure
from jaxserve.config import EngineConfig
from jaxserve.engine.platform import select_platform
from jaxserve.sim import traces
from jaxserve.sim.profile import read_profile, write_profile
from jaxserve.sim.report import aligned
from jaxserve.sim.sweep import PolicySpec, Setting, capacity
from jaxserve.sim.workload import poisson, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", required=True)
    parser.add_argument("--scale-lengths", type=float, default=0.5)
    parser.add_argument("--policy", nargs=2, required=True, metavar=("BASELINE", "POLICY"))
    parser.add_argument("--figure", default="jct_mean_s")
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a run (default 30)")
    parser.add_argument("--rounds", type=int, default=2, help="seeds: each is run under both policies (default 2)")
    parser.add_argument("--profile", type=Path, default=Path("profile.json"))
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    parser.add_argument("--kv-cache-memory", default="128MiB")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="work: processor time, for machines that others use (see player.py)",
    )
    args = parser.parse_args()
    select_platform("cpu")
    options = {
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_model_len": 2048,
        "kv_cache_memory": args.kv_cache_memory,
    }
    if not args.profile.exists():
        say = lambda text: print(text, file=sys.stderr)  # noqa: E731
        write_profile(measure(EngineConfig.of(**options), say=say, clock=args.clock), args.profile)
    machine = read_profile(args.profile).machine()
    policies = [PolicySpec.parse(text) for text in args.policy]
    trace = traces.load(args.trace).shrunk(args.scale_lengths)
    rate = args.load * capacity(Setting(trace=trace, machine=machine, jobs=100, arrivals="poisson"))
    engines = [Engine(options, policy, args.clock) for policy in policies]
    gains: tuple[list[float], list[float]] = ([], [])
    rows, runs = [["seed, policy", f"engine {args.figure}", "simulated"]], []
    for seed in range(args.rounds):
        arrivals = sample(trace, max(20, round(rate * args.seconds)), rate, seed, poisson)
        predicted = [predict(machine, policy, arrivals) for policy in policies]
        measured = [engine.play(arrivals) for engine in engines]
        for policy, of_engine, of_simulator in zip(policies, measured, predicted, strict=True):
            values = of_engine[args.figure], of_simulator[args.figure]
            rows.append([f"{seed}, {policy.text}", *(f"{value:.3f}" for value in values)])
            runs.append({"seed": seed, "policy": policy.text, "measured": of_engine, "predicted": of_simulator})
        for into, (base, other) in zip(gains, (predicted, measured), strict=True):
            into.append(base[args.figure] / other[args.figure] - 1)
    promised, found = statistics.fmean(gains[0]), statistics.fmean(gains[1])
    print(aligned(rows))
    print(f"gain of {policies[1].text} over {policies[0].text}: {found:+.2f} in the engine, {promised:+.2f} simulated")
    if args.json is not None:
        args.json.write_text(json.dumps({"promised": promised, "found": found, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
