"""`jaxserve complete`: continues a text, to stdout as it comes."""

from __future__ import annotations

import argparse
import sys

from jaxserve.cli.parser import Parser, add_engine_options
from jaxserve.cli.sampling import add_sampling_options, sampling_fields
from jaxserve.cli.talk import COMPLETE, add_server_options, talker
from jaxserve.config import ConfigError

DEFAULT_MAX_TOKENS = 256


def parser() -> Parser:
    made = Parser(
        "complete",
        """
        Continues a text. The continuation goes to stdout as it is generated; everything else goes to stderr.
        """,
        """
        jaxserve complete "Once upon a time"
        cat story.txt | jaxserve complete --max-tokens 500 --temperature 0.8 >> story.txt
        jaxserve complete "def fibonacci(n):" --model ~/models/Qwen3-0.6B --stop "\\n\\n"
        jaxserve complete "Dear Sir," --url http://127.0.0.1:8000
        """,
    )
    made.add_argument("prompt", metavar="TEXT", nargs="?", help="The text to continue. Default: standard input.")
    made.add_argument("--echo", action="store_true", help="Print the text in front of its continuation.")
    add_sampling_options(made)
    add_server_options(made)
    add_engine_options(made)
    return made


def run(args: argparse.Namespace) -> int:
    prompt = args.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise ConfigError(
                "complete needs a text, as an argument or on standard input (see jaxserve complete --help)"
            )
        prompt = sys.stdin.read()
    if not prompt:
        raise ConfigError("the text to continue is empty")
    body = {"prompt": prompt, "max_tokens": DEFAULT_MAX_TOKENS, **sampling_fields(args)}
    model = talker(args)
    try:
        if args.echo:
            print(prompt, end="", flush=True)
        for text in model.stream(COMPLETE, body):
            print(text, end="", flush=True)
        print()
    finally:
        model.close()
    return 0
