"""`jaxserve simulate`: scheduling policies on traces in virtual time, compared at several loads."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from jaxserve.cli.parser import Parser
from jaxserve.config import ConfigError, human_int
from jaxserve.sim import traces
from jaxserve.sim.link import LINKS
from jaxserve.sim.machine import HOST_OPTIONS, OPTIONS, PUBLISHED_KV_TOKENS, SHAPE_OPTIONS, Machine, published
from jaxserve.sim.metrics import SLO, interval
from jaxserve.sim.profile import read_profile
from jaxserve.sim.report import aligned, as_json, estimate, number, table
from jaxserve.sim.sweep import Bar, Cell, PolicySpec, Setting, capacity, highest_rate, sweep
from jaxserve.sim.workload import Trace

DEFAULT_REQUESTS = 200


def parser() -> Parser:
    known = "\n".join(f"  {name:<20}{text}" for name, text in traces.descriptions().items())
    made = Parser(
        "simulate",
        """
        Runs the engine's own scheduler in virtual time: every policy on the same arrivals, at several loads, over
        several seeds. Steps cost what a published fit of a real GPU says, or what `jaxserve profile` measured here.

        Load 1.0 is the machine's capacity for the trace: the jobs a second that it completes under sarathi when there
        is always another one.
        """,
        """
        jaxserve simulate                                             # fcfs, sarathi or mlfq for Azure conversations?
        jaxserve simulate --trace heavy-tail --policy fcfs,sarathi --load 1.0 --seeds 5 --out heavy
        jaxserve simulate --trace agents:turns=uniform/2/6 --arrivals poisson --replicas 4 --dispatch prefix-affinity
        jaxserve simulate --policy fcfs,sarathi:max_num_batched_tokens=512 --slo-tpot 0.05
        jaxserve simulate --policy fcfs,sarathi:max_num_batched_tokens=512 --find-capacity 0.1
        jaxserve simulate --trace ~/AzureLLMInferenceTrace_conv.csv --requests 100k --load 1.0 --seeds 1
        jaxserve profile -o here.json && jaxserve simulate --cost here.json --scale-lengths 0.25

        traces of the package (or name a file of the same formats; the made-up ones take name:key=value,...):
        """
        + "\n".join("        " + line for line in known.splitlines()),
    )
    load = made.add_argument_group("load")
    load.add_argument("--trace", default="azure-conv", metavar="NAME|FILE", help="What arrives. Default: azure-conv.")
    load.add_argument(
        "--requests",
        type=human_int,
        metavar="N",
        help="Requests of a run, from a place in the trace that the seed chooses. Sessions count with all their turns, "
        f"and whole ones are taken. Default: {DEFAULT_REQUESTS}.",
    )
    load.add_argument(
        "--load", default="0.5,0.8,1.0,1.2", metavar="X,...", help="Shares of the capacity. Default: 0.5,0.8,1.0,1.2."
    )
    load.add_argument(
        "--rate", type=float, metavar="R", help="Jobs a second that load 1.0 means, instead of the capacity."
    )
    load.add_argument(
        "--arrivals",
        metavar="HOW",
        help="trace (its own rhythm, scaled), poisson, or gamma/CV. Default: trace where it has times, else poisson.",
    )
    load.add_argument("--seeds", type=int, default=3, metavar="N", help="Runs of each case. Default: 3.")
    load.add_argument(
        "--scale-lengths", type=float, default=1.0, metavar="F", help="Multiply prompt and answer lengths. Default: 1."
    )
    load.add_argument(
        "--max-tokens",
        default="longest",
        metavar="N|longest|exact",
        help="What clients allow a request to generate, which schedulers see: a number, the trace's longest answer, or "
        "exactly what it will generate (for policies that need to know). Default: longest.",
    )
    load.add_argument(
        "--programs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Whether sessions say which program they are: their pages can be held between turns. Default: yes.",
    )
    what = made.add_argument_group("what serves it")
    what.add_argument(
        "--policy",
        default="fcfs,sarathi,mlfq",
        metavar="NAME,...",
        help="Scheduling policies; name:key=value:... gives parameters of the policy, or "
        "" + ", ".join(OPTIONS) + ". "
        "Default: fcfs,sarathi,mlfq.",
    )
    what.add_argument(
        "--cost",
        default="published",
        metavar="published|FILE",
        help="published: OPT-13B on an A100 (DistServe's fit). FILE: a profile from `jaxserve profile`.",
    )
    what.add_argument("--replicas", type=int, default=1, metavar="N", help="Engines that share the load. Default: 1.")
    what.add_argument(
        "--dispatch",
        default="round-robin",
        metavar="HOW",
        help="Who gets a request: round-robin, least-loaded, prefix-affinity. Default: round-robin.",
    )
    what.add_argument("--max-num-seqs", type=human_int, metavar="N", help="Slots. Default: 64, or the profile's.")
    what.add_argument(
        "--max-num-batched-tokens", type=human_int, metavar="N", help="Token budget. Default: 2048, or the profile's."
    )
    what.add_argument(
        "--kv-tokens", type=human_int, metavar="N", help=f"Size of the KV cache. Default: {PUBLISHED_KV_TOKENS:,}."
    )
    what.add_argument(
        "--host-kv-tokens", type=human_int, metavar="N", help="Host memory to swap to, in tokens. Default: none."
    )
    what.add_argument(
        "--host-link-gbps", type=float, metavar="G", help="Gigabits a second to and from it. Default: 192."
    )
    what.add_argument(
        "--host-copies", choices=sorted(LINKS), help="How these copies are made, see sim/link.py. Default: gathered."
    )
    result = made.add_argument_group("result")
    result.add_argument(
        "--slo-ttft", type=float, default=2.0, metavar="S", help="SLO: time to first token. Default: 2."
    )
    result.add_argument("--slo-tpot", type=float, default=0.1, metavar="S", help="SLO: time per token. Default: 0.1.")
    result.add_argument(
        "--find-capacity",
        type=float,
        metavar="TBT",
        help="Instead of running the loads: find the highest rate at which the p99 time between tokens stays in TBT "
        "seconds and median queueing within 2 s (Sarathi-Serve's protocol).",
    )
    result.add_argument("--out", type=Path, metavar="DIR", help="Write table.txt, result.json and plots there.")
    result.add_argument("--workers", type=int, metavar="N", help="Processes. Default: one a core.")
    return made


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    loads = _numbers("--load", args.load)
    if args.seeds < 1 or args.replicas < 1:
        raise ConfigError("--seeds and --replicas must be at least 1")
    try:
        trace = traces.load(args.trace).shrunk(args.scale_lengths)
        policies = [PolicySpec.parse(text) for text in args.policy.split(",")]
        setting = _setting(args, trace)
        unit = args.rate or capacity(setting)
    except OSError as error:
        raise ConfigError(f"--trace {args.trace}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    about = _about(args, setting, unit)
    print(_headline(setting, unit, args), file=sys.stderr)
    if args.find_capacity is not None:
        return _find_capacity(args, setting, policies, unit)
    workers = args.workers or os.cpu_count() or 1
    cells = list(sweep(setting, policies, loads, args.seeds, unit, workers, _progress()))
    text = table(cells)
    print(text)
    for line in _remarks(cells):
        print(line)
    if args.out is not None:
        _write(args.out, text, cells, about)
    print(f"{time.perf_counter() - started:.1f} s", file=sys.stderr)
    return 0


def _find_capacity(args: argparse.Namespace, setting: Setting, policies: list[PolicySpec], unit: float) -> int:
    bar = Bar(tbt_p99=args.find_capacity)
    rows = [["policy", "jobs/s", "of the first"]]
    made: list[dict[str, Any]] = []
    for policy in policies:
        found = interval([highest_rate(setting, policy, bar, seed, 2 * unit) for seed in range(args.seeds)])
        made.append({"policy": policy.text, "jobs_per_s": found[0]})
        share = number(found[0] / made[0]["jobs_per_s"]) if made[0]["jobs_per_s"] else "-"
        rows.append([policy.text, estimate("jobs_per_s", found), share])
    text = aligned(rows)
    print(f"highest rate with p99 TBT <= {bar.tbt_p99:g} s and median queueing <= {bar.queue_p50:g} s\n{text}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        about = {**_about(args, setting, unit), "tbt_p99_s": bar.tbt_p99, "queue_p50_s": bar.queue_p50}
        (args.out / "capacity.json").write_text(json.dumps({**about, "policies": made}, indent=1) + "\n")
    return 0


def _numbers(flag: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text!r} is not a list of numbers such as 0.5,1.0") from None
    if min(found) <= 0:
        raise ConfigError(f"{flag} {text!r} must be above 0")
    return found


def _setting(args: argparse.Namespace, trace: Trace) -> Setting:
    if args.scale_lengths <= 0:
        raise ConfigError(f"--scale-lengths {args.scale_lengths} must be above 0")
    requests = args.requests or DEFAULT_REQUESTS
    jobs = max(1, round(requests * len(trace.jobs) / trace.requests))
    arrivals = args.arrivals or ("poisson" if math.isinf(trace.rate) else "trace")
    return Setting(
        trace=trace,
        machine=_machine(args, trace),
        jobs=jobs,
        arrivals=arrivals,
        replicas=args.replicas,
        dispatch=args.dispatch,
        max_tokens=_max_tokens(args.max_tokens, trace),
        programs=args.programs,
        slo=SLO(args.slo_ttft, args.slo_tpot),
    )


def _max_tokens(text: str, trace: Trace) -> int | None:
    if text == "exact":
        return None
    return max(turn.output for turn in trace.turns) if text == "longest" else human_int(text)


def _machine(args: argparse.Namespace, trace: Trace) -> Machine:
    host = {name: getattr(args, name) for name in HOST_OPTIONS if getattr(args, name) is not None}
    machine = _bare_machine(args, trace)
    return machine.with_options(**host) if host else machine


def _bare_machine(args: argparse.Namespace, trace: Trace) -> Machine:
    options = {name: getattr(args, name) for name in SHAPE_OPTIONS}
    given = {name: value for name, value in options.items() if value is not None}
    if args.cost == "published":
        kv_tokens = args.kv_tokens or PUBLISHED_KV_TOKENS
        return published(max_model_len=min(kv_tokens, max(trace.longest, 64)), kv_tokens=kv_tokens, **given)
    if given:
        raise ConfigError(
            "a profile holds for the shapes it was taken with: give --max-num-seqs and the like to `profile`"
        )
    machine = read_profile(Path(args.cost)).machine()
    return machine.with_kv_tokens(args.kv_tokens) if args.kv_tokens else machine


def _about(args: argparse.Namespace, setting: Setting, unit: float) -> dict[str, Any]:
    return {
        "command": ["jaxserve", "simulate", *sys.argv[2:]],
        "trace": setting.trace.name,
        "arrivals": setting.arrivals,
        "jobs": setting.jobs,
        "machine": setting.machine.name,
        "max_num_seqs": setting.machine.shape.slots,
        "max_num_batched_tokens": setting.machine.shape.budget,
        "kv_tokens": setting.machine.kv_tokens,
        "replicas": setting.replicas,
        "dispatch": setting.dispatch,
        "jobs_per_s_at_load_1": unit,
        "slo": {"ttft_s": setting.slo.ttft, "tpot_s": setting.slo.tpot},
        "seeds": args.seeds,
    }


def _headline(setting: Setting, unit: float, args: argparse.Namespace) -> str:
    trace, machine = setting.trace, setting.machine
    count = trace.requests
    prompt = sum(turn.prompt for turn in trace.turns) / count
    output = sum(turn.output for turn in trace.turns) / count
    turns = f" in {len(trace.jobs):,} sessions" if count > len(trace.jobs) else ""
    return (
        f"{trace.name}: {count:,} requests{turns}, on average {prompt:,.0f} prompt and {output:,.0f} new tokens; "
        f"{setting.jobs:,} jobs a run, arrivals: {setting.arrivals}\n"
        f"{machine.name}: {machine.shape.slots} slots, {machine.shape.budget:,} tokens a step, KV for "
        f"{machine.kv_tokens:,} tokens, {setting.replicas} replica{'s' if setting.replicas > 1 else ''}; "
        f"load 1.0 is {number(unit)} jobs/s"
    )


def _remarks(cells: list[Cell]) -> list[str]:
    remarks = []
    for policy in dict.fromkeys(cell.policy for cell in cells):
        errors = sum(run.get("policy_errors", 0) for cell in cells if cell.policy == policy for run in cell.runs)
        if errors:
            remarks.append(f"{policy} raised {errors:.0f} times; those steps went by order of arrival")
    refused = max(run["refused"] for cell in cells for run in cell.runs)
    if not refused:
        return remarks
    return [
        *remarks,
        f"up to {refused:.0f} requests of a run do not fit the machine and were refused (--scale-lengths, --kv-tokens)",
    ]


def _progress() -> Any:
    if not sys.stderr.isatty():
        return lambda done, of: None
    from tqdm import tqdm

    bar = tqdm(unit="run", leave=False)

    def show(done: int, of: int) -> None:
        bar.total = of
        bar.update(1)
        if done == of:
            bar.close()

    return show


def _write(folder: Path, text: str, cells: list[Cell], about: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.txt").write_text(text + "\n")
    (folder / "result.json").write_text(json.dumps(as_json(cells, about), indent=1) + "\n")
    written = ["table.txt", "result.json"]
    try:
        from jaxserve.sim.plots import draw

        written += [path.name for path in draw(cells, folder)]
    except ImportError:
        print("no plots: matplotlib is missing (pip install matplotlib)", file=sys.stderr)
    print(f"{folder}: {', '.join(written)}", file=sys.stderr)
