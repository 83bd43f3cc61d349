"""`jaxserve eval`: what a model, or a technique, gets right."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.errors import Failure
from jaxserve.cli.parser import Parser, choose_platform
from jaxserve.config import ConfigError, add_arguments, from_arguments

if TYPE_CHECKING:
    from jaxserve.eval.options import EvalConfig


def parser() -> Parser:
    from jaxserve.eval.options import EvalConfig

    made = Parser(
        "eval",
        """
        Measures answers. Retrieval tasks of chosen lengths are generated from a seed and asked in three modes: each
        question with its context alone, turn by turn, and many questions on one shared context. Prints accuracy by
        length, depth and turn with confidence intervals. docs/evaluation.md explains how to read the numbers.
        """,
        """
        jaxserve eval --items 20                                  # the bundled model, a few minutes
        jaxserve eval --task kv-recall needle --lengths 512,4096 --model ~/models/Qwen3-0.6B --style chat
        jaxserve eval --compare configs/eval/dense.yaml configs/eval/bf16.yaml --task induction --turns 12 --out kv
        jaxserve eval --agree-with transformers --kv-cache-dtype f32 --items 4
        jaxserve eval --out results                               # run it again to go on after an interruption
        """,
    )
    made.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="FILE.yaml",
        help="Engine options of two or more configurations: each runs on the same items, and all are compared with the "
        "first. With --out also comparison.json and comparison.png.",
    )
    made.add_argument(
        "--agree-with",
        metavar="transformers|FILE.yaml",
        help="Instead of tasks: greedy tokens and next-token distributions of this engine against Hugging Face "
        "transformers or another configuration, on --items pieces of --text of --window tokens.",
    )
    add_arguments(made, EvalConfig)
    return made


def run(args: argparse.Namespace) -> int:
    from jaxserve.eval.options import EvalConfig

    for name in ("task", "lengths", "mode"):
        if name in args:
            setattr(args, name, [part for text in getattr(args, name) for part in text.split(",") if part])
    if "wait_for_buckets" not in args:
        args.wait_for_buckets = True  # a program swapped in during a run would change its last bits
    config = from_arguments(EvalConfig, args)
    choose_platform(config.engine)
    progress = sys.stderr.isatty()
    if args.agree_with is not None and args.compare is not None:
        raise ConfigError("--agree-with and --compare are two kinds of runs: give one of them")
    try:
        if args.agree_with is not None:
            return _agree(config, args.agree_with)
        return _single(config, progress) if args.compare is None else _compare(config, args.compare, progress)
    except RuntimeError as error:
        raise Failure(str(error)) from None


def _single(config: EvalConfig, progress: bool) -> int:
    from jaxserve.eval.report import summary, tables, write_json
    from jaxserve.eval.run import evaluate

    result = evaluate(config, progress)
    print(tables(result), end="")
    if config.eval.out is not None:
        write_json(Path(config.eval.out) / "summary.json", summary(result))
    return 0


def _agree(config: EvalConfig, reference: str) -> int:
    from jaxserve.eval.agreement import as_data, table
    from jaxserve.eval.readings import agree
    from jaxserve.eval.report import write_json

    found = agree(config, reference)
    print(table(found, reference), end="")
    if config.eval.out is not None:
        folder = Path(config.eval.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "agreement.json", as_data(found, reference))
    return 0


def _compare(config: EvalConfig, files: list[Path], progress: bool) -> int:
    from jaxserve.eval.compare import compare, comparison, comparison_table, plot, read_contestants
    from jaxserve.eval.report import write_json

    results = compare(read_contestants(config, files), progress)
    print(comparison_table(results), end="")
    if config.eval.out is not None:
        folder = Path(config.eval.out)
        write_json(folder / "comparison.json", comparison(results))
        plot(results, folder / "comparison.png")
    return 0
