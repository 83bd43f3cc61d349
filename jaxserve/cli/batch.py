"""`jaxserve batch`: options to a batch job, with an engine of its own or a server."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.errors import Failure
from jaxserve.cli.parser import Parser, add_engine_options, engine_config
from jaxserve.cli.talk import add_server_options, api_base, auth_headers
from jaxserve.config import ConfigError, human_int, read_yaml

if TYPE_CHECKING:
    from jaxserve.batch.run import AnswerTo


BATCH_POLICY = "batchllm"
"""Nobody waits for a single answer of a batch, so requests that share a prefix run together unless options say else."""


def parser() -> Parser:
    made = Parser(
        "batch",
        """
        Answers every line of a JSONL file in the form of OpenAI's batches (/v1/completions, /v1/chat/completions), in
        the order of the input. Run the same command again after an interruption of any kind: it goes on where the
        output ends. Bad lines get an error of their own; the last line on stderr counts them.
        """,
        """
        jaxserve batch -i questions.jsonl -o answers.jsonl
        jaxserve batch -i questions.jsonl -o answers.jsonl --model ~/models/Qwen3-0.6B --max-num-seqs 64
        jaxserve batch -i questions.jsonl -o answers.jsonl --url http://127.0.0.1:8000 --concurrency 64

        a line: {"custom_id": "a1", "method": "POST", "url": "/v1/chat/completions",
                 "body": {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}}
        """,
    )
    made.add_argument("-i", "--input", type=Path, required=True, metavar="FILE", help="JSONL to read.")
    made.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="JSONL to write, or to go on with."
    )
    made.add_argument(
        "--window",
        default="10000",
        metavar="LINES",
        help="Lines in work at once, at most: the scheduler may reorder among them. Default: 10000.",
    )
    made.add_argument(
        "--concurrency", default="256", metavar="N", help="Requests in flight to the server at --url. Default: 256."
    )
    add_server_options(made)
    add_engine_options(made)
    return made


def run(args: argparse.Namespace) -> int:
    window, concurrency = _count("--window", args.window), _count("--concurrency", args.concurrency)
    if args.url is None:
        config = engine_config(args)
        chosen = {*vars(args), *(read_yaml(args.config) if getattr(args, "config", None) else ())}
        if "scheduling_policy" not in chosen:
            config = replace(config, scheduler=replace(config.scheduler, scheduling_policy=BATCH_POLICY))

        def local() -> AbstractAsyncContextManager[AnswerTo]:
            from jaxserve.batch.local import local_answers

            return local_answers(config, window)

        asyncio.run(_job(args, window, local))
        return 0
    if "model" in args:
        raise ConfigError("--model has no meaning with --url: each line names its model")
    base, headers = api_base(args.url), auth_headers(args.api_key)

    def remote() -> AbstractAsyncContextManager[AnswerTo]:
        from jaxserve.batch.remote import remote_answers

        return remote_answers(base, headers, concurrency)

    asyncio.run(_job(args, window, remote))
    return 0


async def _job(
    args: argparse.Namespace, window: int, answers: Callable[[], AbstractAsyncContextManager[AnswerTo]]
) -> None:
    """Imports inside the event loop, whose Ctrl-C cancels this task: outside of it Python loses the KeyboardInterrupt
    that meets jax's callback of the garbage collector, and imports collect a lot."""
    from jaxserve.batch.run import JobFailed, check_paths, run_job

    check_paths(args.input, args.output)  # before an engine is loaded for nothing
    try:
        async with answers() as answer:
            progress = await run_job(args.input, args.output, answer, window)
    except JobFailed as error:
        raise Failure(f"{error}; run the same command again to go on") from None
    progress.finish()


def _count(flag: str, text: str) -> int:
    try:
        value = human_int(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None
    if value < 1:
        raise ConfigError(f"{flag} {text} must be at least 1")
    return value
