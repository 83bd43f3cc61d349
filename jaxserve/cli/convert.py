"""`jaxserve convert`: a Hugging Face folder to an Orbax folder. Knows no engine."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from jaxserve.cli.parser import Parser
from jaxserve.config import ConfigError, ModelOptions, build


def parser() -> Parser:
    made = Parser(
        "convert",
        """
        Reads a model in Hugging Face layout and writes it as an Orbax checkpoint, with its tokenizer beside it:
        quantized once, instead of at every start. `--model TARGET` then serves it.
        """,
        """
        jaxserve convert ~/models/Qwen3-0.6B ~/models/Qwen3-0.6B-int8 --quantization int8
        jaxserve convert Qwen/Qwen3-0.6B ~/models/qwen3-f32 --dtype float32
        jaxserve serve ~/models/Qwen3-0.6B-int8
        """,
    )
    made.add_argument("source", metavar="SOURCE", help="Folder in Hugging Face layout, or a hub id.")
    made.add_argument("target", metavar="TARGET", type=Path, help="Folder to write; must not hold a model yet.")
    for name, text in (
        ("dtype", "Type of the weights that are not quantized. Default: the checkpoint's own."),
        ("quantization", "Weight format, such as int8. Default: none."),
        ("revision", "Branch, tag or commit of a hub id."),
    ):
        made.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar="NAME", help=text)
    return made


def run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in ("dtype", "quantization", "revision") if name in args}
    options = build(ModelOptions, {"model": args.source, **given})
    if args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
        raise ConfigError(f"{args.target} exists and is not an empty folder; name another one or remove it")
    # The weights only pass through: a GPU has nothing to do here, and may be too small for them.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxserve.checkpoint import load_model, resolve, save_orbax

    start = time.monotonic()
    folder = resolve(args.source, options.revision)
    model, params = load_model(folder, options.dtype, options.quantization)
    save_orbax(args.target, model, params, folder)
    size = sum(file.stat().st_size for file in args.target.rglob("*") if file.is_file())
    print(f"jaxserve: {args.target}: {size / 1e6:,.1f} MB in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return 0
