"""`jaxserve bench`: throughput of the library, latency of one stream, behaviour of a server under streaming clients."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

from jaxserve.cli.load import Prompt, Shot, measure, summary
from jaxserve.cli.parser import Parser, add_engine_options, engine_config, engine_options
from jaxserve.cli.talk import api_base, auth_headers
from jaxserve.config import ConfigError
from jaxserve.sim import metrics, traces
from jaxserve.sim.sweep import gaps_of
from jaxserve.sim.workload import Trace, sample
from jaxserve.types import SamplingParams

# Ids that every tokenizer has, above the special tokens that small vocabularies begin with.
RANDOM_IDS = (300, 1000)


def parser() -> Parser:
    made = Parser(
        "bench",
        """
        Measures. `throughput` runs many prompts through the library, `latency` one after the other, `serve` sends
        streaming requests to a server (ours or any other OpenAI-compatible one). Prompts are random tokens, or yours;
        `serve --trace` replays a trace, at its own times, with the metrics of `jaxserve simulate`.
        """,
        """
        jaxserve bench throughput --num-prompts 64 --output-len 128
        jaxserve bench latency --model ~/models/Qwen3-0.6B --input-len 128
        jaxserve bench serve --url http://127.0.0.1:8000 --clients 16 --num-prompts 64 --json result.json
        jaxserve bench serve --trace azure-conv --num-prompts 200 --rate 4 --scale-lengths 0.25
        """,
    )
    verbs = made.add_subparsers(dest="what", metavar="{throughput,latency,serve}", required=True)
    for name, text, examples in (
        (
            "throughput",
            "All prompts at once through the library.",
            "jaxserve bench throughput --num-prompts 64 --max-num-seqs 16",
        ),
        (
            "latency",
            "One request at a time through the library.",
            "jaxserve bench latency --input-len 128 --output-len 64",
        ),
        (
            "serve",
            "Streaming clients against a server.",
            "jaxserve bench serve --url http://127.0.0.1:8000 --clients 16\n"
            "jaxserve bench serve --trace agents --num-prompts 100 --rate 0.5 --slo-ttft 1",
        ),
    ):
        sub: Any = verbs.add_parser(name, help=text, verb=f"bench {name}", description=text, examples=examples)
        _add_workload(sub, num_prompts=8 if name == "latency" else 64)
        if name == "serve":
            sub.add_argument(
                "--url", metavar="URL", default="http://127.0.0.1:8000", help="The server. Default: %(default)s."
            )
            sub.add_argument("--api-key", metavar="KEY", help="Key for it. Default: the variable OPENAI_API_KEY.")
            sub.add_argument("--model", metavar="NAME", help="Name to send as `model`, where the server wants one.")
            sub.add_argument("--clients", type=int, default=16, metavar="N", help="Requests in flight. Default: 16.")
            _add_trace(sub)
        else:
            add_engine_options(sub)
    return made


def _add_workload(parser: argparse.ArgumentParser, num_prompts: int) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--num-prompts", type=int, default=num_prompts, metavar="N", help=f"Default: {num_prompts}.")
    group.add_argument(
        "--input-len",
        default="32:512",
        metavar="N|LOW:HIGH",
        help="Tokens of a random prompt. Default: 32:512, evenly.",
    )
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="Prompts to use instead: JSONL with a field `prompt` (text or token ids), or a text a line.",
    )
    group.add_argument("--output-len", type=int, default=128, metavar="N", help="Tokens to generate. Default: 128.")
    group.add_argument(
        "--warmup", type=int, default=4, metavar="N", help="Requests before the clock starts. Default: 4."
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="Write the figures there as well.")


def _add_trace(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("trace", "Instead of --clients: requests come when the trace says.")
    group.add_argument(
        "--trace",
        metavar="NAME|FILE",
        help="What to replay: see `jaxserve simulate --help`. --num-prompts says how many requests of it.",
    )
    group.add_argument("--rate", type=float, metavar="R", help="Jobs a second. Default: the trace's own.")
    group.add_argument(
        "--arrivals", metavar="HOW", help="trace, poisson or gamma/CV. Default: trace where it has times."
    )
    group.add_argument("--scale-lengths", type=float, default=1.0, metavar="F", help="Multiply lengths. Default: 1.")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="Chooses the place in the trace. Default: 0.")
    group.add_argument(
        "--programs", action="store_true", help="Sessions say which program they are (only jaxserve knows the field)."
    )
    group.add_argument("--slo-ttft", type=float, default=2.0, metavar="S", help="SLO: time to first token. Default: 2.")
    group.add_argument("--slo-tpot", type=float, default=0.1, metavar="S", help="SLO: time per token. Default: 0.1.")


def run(args: argparse.Namespace) -> int:
    if min(args.num_prompts, args.output_len) < 1 or args.warmup < 0:
        raise ConfigError("--num-prompts and --output-len must be at least 1, --warmup at least 0")
    if getattr(args, "trace", None) is not None:
        return _report(args, "serve", _replay(args))
    prompts = _prompts(args)
    figures = {"throughput": _throughput, "latency": _latency, "serve": _serve}[args.what](args, prompts)
    return _report(args, args.what, figures)


def _report(args: argparse.Namespace, what: str, figures: dict[str, float]) -> int:
    _print_table(f"bench {what}", figures)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    if args.prompts is not None:
        found = read_prompts(args.prompts)
        return [found[i % len(found)] for i in range(args.num_prompts)]
    try:
        low, high = (int(part) for part in (args.input_len.split(":") * 2)[:2])
    except ValueError:
        raise ConfigError(f"--input-len {args.input_len!r} is not a number or LOW:HIGH") from None
    if not 1 <= low <= high:
        raise ConfigError(f"--input-len {args.input_len!r} must be at least 1, LOW not above HIGH")
    draw = random.Random(0)
    return [[draw.randrange(*RANDOM_IDS) for _ in range(draw.randint(low, high))] for _ in range(args.num_prompts)]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: JSONL with a field `prompt`, or a text a line.

    Raises:
        ConfigError: the file cannot be read or holds none.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        found: list[Prompt] = [json.loads(line)["prompt"] if line.startswith("{") else line for line in lines]
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}") from None
    except (ValueError, KeyError) as error:
        raise ConfigError(f"--prompts {path} is not JSONL with a field `prompt`: {error}") from None
    if not found:
        raise ConfigError(f"--prompts {path} holds no prompt")
    return found


def _serve(args: argparse.Namespace, prompts: list[Prompt]) -> dict[str, float]:
    if args.clients < 1:
        raise ConfigError(f"--clients {args.clients} must be at least 1")
    base, headers = api_base(args.url), auth_headers(args.api_key)
    fields: dict[str, Any] = {"max_tokens": args.output_len, "temperature": 0, "ignore_eos": True}
    if args.model is not None:
        fields["model"] = args.model

    async def both() -> list[Shot]:
        if args.warmup:
            await measure(base, [prompts[i % len(prompts)] for i in range(args.warmup)], args.clients, fields, headers)
        return await measure(base, prompts, args.clients, fields, headers)

    return {"clients": args.clients, **summary(asyncio.run(both()))}


def _replay(args: argparse.Namespace) -> dict[str, float]:
    from jaxserve.cli.replay import Replay

    trace = _trace(args)
    fields = {} if args.model is None else {"model": args.model}
    replay = Replay(api_base(args.url), auth_headers(args.api_key), fields, args.programs)
    run = asyncio.run(replay.play(trace))
    if replay.refusal:
        print(f"{run.refused} requests were refused; the first: {replay.refusal}", file=sys.stderr)
    return metrics.figures(run, metrics.SLO(args.slo_ttft, args.slo_tpot))


def _trace(args: argparse.Namespace) -> Trace:
    try:
        trace = traces.load(args.trace).shrunk(args.scale_lengths)
        timed = not math.isinf(trace.rate)
        gaps = gaps_of(args.arrivals or ("trace" if timed else "poisson"))
        rate = args.rate or trace.rate
        if math.isinf(rate):
            raise ConfigError(f"--trace {args.trace} has no arrival times: say how many jobs a second with --rate")
        jobs = max(1, round(args.num_prompts * len(trace.jobs) / trace.requests))
        return sample(trace, jobs, rate, args.seed, gaps)
    except OSError as error:
        raise ConfigError(f"--trace {args.trace}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _throughput(args: argparse.Namespace, prompts: list[Prompt]) -> dict[str, float]:
    options = engine_options(args)
    from jaxserve.api import LLM

    params = _params(args)
    with LLM(**options) as llm:
        if args.warmup:
            llm.generate([prompts[i % len(prompts)] for i in range(args.warmup)], params, use_tqdm=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
    new = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "requests": len(prompts),
        "seconds": seconds,
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "new_tokens": new,
        "requests_per_s": len(prompts) / seconds,
        "new_tokens_per_s": new / seconds,
    }


def _latency(args: argparse.Namespace, prompts: list[Prompt]) -> dict[str, float]:
    config = engine_config(args)
    from jaxserve.api import AsyncLLM

    params = _params(args)

    async def shoot(llm: AsyncLLM, prompt: Prompt) -> Shot:
        sent = time.perf_counter()
        first = last = 0.0
        async with await llm.submit(prompt, params) as stream:
            async for _ in stream:
                last = time.perf_counter()
                first = first or last
            output = stream.output()
        return Shot(sent, first, last, len(output.prompt_token_ids), len(output.outputs[0].token_ids))

    async def all_shots() -> list[Shot]:
        llm = AsyncLLM(config)
        try:
            await llm.start()
            for i in range(args.warmup):
                await shoot(llm, prompts[i % len(prompts)])
            return [await shoot(llm, prompt) for prompt in prompts]
        finally:
            await llm.close()

    return summary(asyncio.run(all_shots()))


def _params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(max_tokens=args.output_len, temperature=0.0, ignore_eos=True, detokenize=False)


def _print_table(title: str, figures: dict[str, float]) -> None:
    print(title)
    for name, value in figures.items():
        print(f"  {name:<20} {value:>14,.2f}" if isinstance(value, float) else f"  {name:<20} {value:>14,}")
    sys.stdout.flush()
