"""`jaxserve chat`: a conversation in the terminal, or one message and its answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator
from contextlib import closing
from typing import Any

from jaxserve.cli.errors import Failure
from jaxserve.cli.parser import Parser, add_engine_options
from jaxserve.cli.sampling import add_sampling_options, sampling_fields
from jaxserve.cli.talk import CHAT, Talker, add_server_options, talker
from jaxserve.config import ConfigError
from jaxserve.types import ParamError

Messages = list[dict[str, str]]

_COMMANDS = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


def parser() -> Parser:
    made = Parser(
        "chat",
        f"""
        Talks with a model. With a message, as an argument or on standard input, it prints one answer and ends; without
        one it opens a conversation: {_COMMANDS}
        """,
        """
        jaxserve chat
        jaxserve chat "Tell me a story about a fox." --temperature 0.8
        git diff | jaxserve chat --system "Write a commit message for this diff." --model ~/models/Qwen3-0.6B
        jaxserve chat --url http://127.0.0.1:8000
        """,
    )
    made.add_argument(
        "message",
        metavar="MESSAGE",
        nargs="?",
        help="Ask this and end. Default: standard input, unless it is a terminal.",
    )
    made.add_argument("--system", metavar="TEXT", help="A system message to begin with.")
    add_sampling_options(made)
    add_server_options(made)
    add_engine_options(made)
    return made


def run(args: argparse.Namespace) -> int:
    message = args.message
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read()
    if message is not None and not message.strip():
        raise ConfigError("the message is empty")
    model = talker(args)
    conversation = Conversation(model, args.system, sampling_fields(args))
    with closing(model):
        if message is None:
            return _converse(conversation)
        for text in conversation.ask(message):
            print(text, end="", flush=True)
        print()
    return 0


class Conversation:
    """What was said, and the model that goes on with it."""

    def __init__(self, model: Talker, system: str | None, fields: dict[str, Any]):
        self._model = model
        self._start: Messages = [{"role": "system", "content": system}] if system else []
        self._fields = fields
        self.messages = list(self._start)

    def clear(self) -> None:
        self.messages = list(self._start)

    def ask(self, message: str) -> Generator[str, None, None]:
        """The answer, piece by piece. It becomes part of the conversation as far as it came; a question without any
        answer is forgotten."""
        self.messages.append({"role": "user", "content": message})
        answer: list[str] = []
        try:
            with closing(self._model.stream(CHAT, {"messages": self.messages, **self._fields})) as pieces:
                for text in pieces:
                    answer.append(text)
                    yield text
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()


def _converse(conversation: Conversation) -> int:
    import readline  # noqa: F401  line editing and history for input()

    print(_COMMANDS, file=sys.stderr)
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            print()
            return 0
        if message in ("/exit", "/quit"):
            return 0
        if message == "/clear":
            conversation.clear()
        elif message.startswith("/"):
            print(_COMMANDS, file=sys.stderr)
        elif message:
            _answer(conversation, message)


def _answer(conversation: Conversation, message: str) -> None:
    try:
        with closing(conversation.ask(message)) as pieces:
            for text in pieces:
                print(text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except (ParamError, Failure) as error:
        print(f"jaxserve: {error}", file=sys.stderr)
