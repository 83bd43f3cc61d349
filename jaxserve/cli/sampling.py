"""Sampling options of the verbs that generate, as fields of an OpenAI request body."""

from __future__ import annotations

import argparse
from typing import Any

_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "Tokens to generate at most."),
    ("temperature", float, "0 always takes the most probable token; higher is more varied."),
    ("top_p", float, "Draw from the most probable tokens that together reach this probability."),
    ("top_k", int, "Draw from this many most probable tokens; 0: no limit."),
    ("min_p", float, "Drop tokens below this share of the best one's probability."),
    ("repetition_penalty", float, "Above 1: tokens of prompt and answer become less likely."),
    ("presence_penalty", float, "Taken from the logits of tokens that the answer has used."),
    ("frequency_penalty", float, "Taken from the logits of tokens for each time that the answer has used them."),
)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling", "Without these: what the model's generation_config.json or the server says."
    )
    for name, kind, text in _OPTIONS:
        group.add_argument(
            "--" + name.replace("_", "-"), dest=f"sampling_{name}", type=kind, help=text, metavar=kind.__name__.upper()
        )
    group.add_argument(
        "--stop",
        dest="sampling_stop",
        action="append",
        metavar="TEXT",
        help="End the answer before this text. May be repeated.",
    )


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given; `--seed`, an option of the engine, seeds the request as well."""
    names = [name for name, _, _ in _OPTIONS] + ["stop"]
    given = {name: value for name in names if (value := getattr(args, f"sampling_{name}")) is not None}
    if "seed" in args:
        given["seed"] = int(args.seed)
    return given
