"""The command `jaxserve`: finds the verb, runs it, and turns what goes wrong into one line and an exit code.

A verb is a module of this package with `parser() -> Parser` and `run(args) -> int`, imported only when it is asked for:
`jaxserve --help` must not wait for jax.

Exit codes: 0 done; 1 the engine or the server failed; 2 a wrong option, file or model; 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxserve.cli.errors import Failure
from jaxserve.config import ConfigError
from jaxserve.types import ParamError

VERBS = {
    "serve": "Answer OpenAI-style HTTP requests.",
    "batch": "Run a JSONL file of OpenAI batch lines; continues where it was interrupted.",
    "chat": "Talk with a model in the terminal.",
    "complete": "Continue a text.",
    "eval": "Measure answers: retrieval, perplexity, data sets, one engine against another.",
    "bench": "Measure throughput and latency, of the library or of any OpenAI-compatible server.",
    "profile": "Measure the steps of the engine here, for `simulate --cost`.",
    "simulate": "Compare scheduling policies on a trace in virtual time.",
    "calibrate": "Find which channels of the KV cache a model needs, for `--kv-cache-dtype zeroc`.",
    "convert": "Rewrite a Hugging Face folder as an Orbax checkpoint, quantized if you like.",
}

_HELP = """\
usage: jaxserve VERB [options]

LLM inference in JAX.

{verbs}

Without --model every verb uses the small model that comes with the package.

examples:
  jaxserve serve                                    # then: curl http://127.0.0.1:8000/v1/models
  jaxserve chat --model ~/models/Qwen3-0.6B
  jaxserve batch -i questions.jsonl -o answers.jsonl

`jaxserve VERB --help` explains a verb; `jaxserve --version` prints the version.
"""


def command() -> NoReturn:
    """The process `jaxserve`: as `main`, and then it ends at once.

    What had to be closed is closed by now. A thread of an engine that is still starting may be inside a compilation,
    which nothing can interrupt: Python would wait for it, or crash over it.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            pass
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader is gone; point stdout at nothing, so that the interpreter's last flush stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ConfigError, ParamError) as error:
        return _fail(error, 2)
    except Failure as error:
        return _fail(error, 1)
    except Exception as error:
        known = _exit_code(error)
        if known is None:
            raise
        return _fail(error, known)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_HELP.format(verbs="\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())), end="")
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"jaxserve {_version()}")
        return 0
    if args[0] not in VERBS:
        raise ConfigError(f"{args[0]!r} is not a verb; use one of {', '.join(VERBS)}, or --help")
    verb = importlib.import_module(f"jaxserve.cli.{args[0]}")
    return verb.run(verb.parser().parse_args(args[1:]))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("jaxserve")
    except PackageNotFoundError:
        return "(not installed; run from a source tree)"


def _exit_code(error: Exception) -> int | None:
    """The exit code of errors whose classes live in rooms that may not have been imported."""
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("jaxserve.")}
    if names & {"CheckpointError", "DoesNotFitError"}:
        return 2
    if "EngineDead" in names:
        return 1
    return None


def _fail(error: Exception, code: int) -> int:
    print(f"jaxserve: {error}", file=sys.stderr)
    return code
