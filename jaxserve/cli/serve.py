"""`jaxserve serve`: options to a running server. Knows nothing of HTTP or engines."""

from __future__ import annotations

import argparse

from jaxserve.cli.parser import Parser, choose_platform
from jaxserve.config import ConfigError, ServeConfig, add_arguments, from_arguments


def parser() -> Parser:
    made = Parser(
        "serve",
        """
        Serves a model with OpenAI's HTTP interface: /v1/completions, /v1/chat/completions, /v1/models and more.
        Without a model it serves the one that comes with the package. SIGTERM lets running requests finish.
        """,
        """
        jaxserve serve
        jaxserve serve ~/models/Qwen3-0.6B --served-model-name qwen small --max-model-len 8K --port 9000
        jaxserve serve --config server.yaml --api-key "$KEY"      # option: value lines; flags win over the file

        curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
          -d '{"messages": [{"role": "user", "content": "Hello!"}], "stream": true}'
        """,
    )
    made.add_argument("model_tag", metavar="MODEL", nargs="?", help="The same as --model.")
    add_arguments(made, ServeConfig)
    return made


def run(args: argparse.Namespace) -> int:
    if args.model_tag is not None:
        if "model" in args:
            raise ConfigError(f"the model is given twice: {args.model_tag!r} and --model {args.model!r}")
        args.model = args.model_tag
    config = from_arguments(ServeConfig, args)
    choose_platform(config.engine)
    from jaxserve.server.main import run as serve

    return serve(config)
