"""`jaxserve calibrate`: what `--kv-cache-dtype zeroc` needs to know of a model."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jaxserve.calibrate.options import CalibrateOptions
from jaxserve.cli.parser import Parser
from jaxserve.config import ConfigError, ModelOptions, RuntimeOptions, build, human_int

_DEFAULT = CalibrateOptions()


def parser() -> Parser:
    made = Parser(
        "calibrate",
        """
        Finds, for each KV head, the basis in which few channels carry the most of its keys and values, and how many
        channels each layer needs: as few as keep the perplexity of held-out text within --loss-bound. Writes a file for
        `--kv-cache-dtype zeroc --kv-calibration FILE` (docs/techniques/zeroc.md). Use text like the one that will be
        served; the file holds for this model only.
        """,
        """
        jaxserve calibrate -o lookup.kvcal                        # the bundled model, a few minutes
        jaxserve calibrate -o qwen.kvcal --model ~/models/Qwen3-0.6B --text prompts.txt --loss-bound 0.2
        jaxserve calibrate -o qwen.kvcal --model ~/models/Qwen3-0.6B --channels 32 64   # for zeroc+hack4
        jaxserve serve --model ~/models/Qwen3-0.6B --kv-cache-dtype zeroc --kv-calibration qwen.kvcal
        """,
    )
    d = _DEFAULT
    made.add_argument(
        "-o", "--output", type=Path, default=Path("model.kvcal"), metavar="FILE", help="Default: model.kvcal."
    )
    made.add_argument("--model", metavar="FOLDER", help="As for `serve`. Default: the bundled model.")
    made.add_argument("--revision", metavar="NAME", help="Branch, tag or commit of a hub id.")
    made.add_argument(
        "--dtype", default="auto", metavar="NAME", help="auto (float32 on a CPU), float32 or bfloat16. Default: auto."
    )
    made.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text. Default: a sample that comes along.")
    made.add_argument(
        "--loss-bound",
        type=float,
        default=d.loss_bound,
        metavar="PERCENT",
        help=f"Largest rise of perplexity on held-out text. Default: {d.loss_bound}.",
    )
    made.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="Instead of a bound: the share of the channels to keep, such as 0.5.",
    )
    made.add_argument(
        "--channels",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="How many channels a head may keep. Default: all multiples of 16. Packed formats (zeroc+hack4 and so on) "
        "take 32 (with 4 or 8 bits), 64 and 128.",
    )
    made.add_argument(
        "--groups",
        type=int,
        default=d.groups,
        metavar="N",
        help="Most different choices among the layers: each is a KV group with pools and programs of its own. "
        f"Default: {d.groups}.",
    )
    for name, value, text in (
        ("tokens", d.tokens, "Tokens to calibrate with."),
        ("held-out", d.held_out, "Tokens to measure on, at most a quarter of the text."),
        ("window", d.window, "Tokens of a window: a text of its own."),
    ):
        made.add_argument(f"--{name}", type=human_int, default=value, metavar="N", help=f"{text} Default: {value}.")
    return made


def run(args: argparse.Namespace) -> int:
    options = CalibrateOptions(
        loss_bound=args.loss_bound,
        keep=args.keep,
        channels=tuple(args.channels),
        groups=args.groups,
        tokens=args.tokens,
        held_out=args.held_out,
        window=args.window,
    )
    wanted = build(ModelOptions, {"model": args.model, "revision": args.revision, "dtype": args.dtype})
    if wanted.dtype == "float16":
        raise ConfigError("--dtype float16: calibrate in float32 or bfloat16; float16 may clip what it measures")
    try:
        text = None if args.text is None else args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {args.text} cannot be read: {error}") from None
    if not args.output.parent.is_dir():
        raise ConfigError(f"--output {args.output}: there is no folder {args.output.parent}")
    from jaxserve.engine.platform import select_platform

    select_platform(RuntimeOptions().device)
    import jax

    from jaxserve import bundled
    from jaxserve.calibrate.run import calibrate, sample, table
    from jaxserve.checkpoint.kv_calibration import write_calibration
    from jaxserve.checkpoint.source import resolve

    start = time.monotonic()
    folder = bundled.path() if wanted.model is None else resolve(wanted.model, wanted.revision)
    dtype = "float32" if wanted.dtype == "auto" and jax.default_backend() == "cpu" else wanted.dtype
    name = wanted.model or "the bundled model"
    found = calibrate(
        folder, name, sample() if text is None else text, options, dtype=dtype, progress=sys.stderr.isatty()
    )
    write_calibration(args.output, found.calibration)
    print(table(found))
    print(f"jaxserve: {args.output}: calibrated in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0
