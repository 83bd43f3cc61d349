"""Documents as prompts: plain text with Q: and A:, or a chat by the model's template. Knows tokenizers, no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from jaxserve.config import ConfigError
from jaxserve.eval.tasks import Document, Room, Task, TooShort
from jaxserve.text.tokenizer import Tokenizer

CHAT_ANSWER = 64
"""Tokens that a chat model may take to answer."""


class Style(Protocol):
    """How a document is put to a model."""

    def prompt(self, document: Document, turn: int, history: bool) -> list[int]:
        """The token ids that ask for `turn`. `history`: all turns before it, with their golden answers, stand between
        it and the context."""
        ...

    def max_tokens(self, document: Document, turn: int) -> int: ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def right(self, output: str, answer: str) -> bool:
        """Whether generated text counts as the golden answer."""
        ...


@dataclass(frozen=True)
class Plain:
    """Context, then a question and its answer a line. An answer is right when the generated line equals it."""

    tokenizer: Tokenizer

    def prompt(self, document: Document, turn: int, history: bool) -> list[int]:
        asked = document.turns[: turn + 1] if history else document.turns[turn : turn + 1]
        lines = [f"{document.cue.format(one.question)} {one.answer}\n" for one in asked[:-1]]
        last = document.cue.format(asked[-1].question)
        return self.tokenizer.encode(f"{document.context}\n{''.join(lines)}{last}")

    def max_tokens(self, document: Document, turn: int) -> int:
        golden = self.tokenizer.encode(" " + document.turns[turn].answer, add_special_tokens=False)
        return len(golden) + document.extra_tokens

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        newline = self.tokenizer.encode("\n", add_special_tokens=False)
        return tuple(newline) if len(newline) == 1 else ()

    def right(self, output: str, answer: str) -> bool:
        return output.lstrip().split("\n", 1)[0].strip().rstrip(".") == answer


@dataclass(frozen=True)
class Chat:
    """The context and the first question in one user turn, then turn by turn. An answer is right when it holds the
    golden one as whole words."""

    tokenizer: Tokenizer
    render: Callable[[Sequence[Mapping[str, str]]], str]
    """Messages to a prompt that an answer may follow."""

    def prompt(self, document: Document, turn: int, history: bool) -> list[int]:
        asked = document.turns[: turn + 1] if history else document.turns[turn : turn + 1]
        messages: list[dict[str, str]] = []
        for number, one in enumerate(asked):
            question = document.request.format(one.question)
            messages.append({"role": "user", "content": question if number else f"{document.context}\n\n{question}"})
            messages.append({"role": "assistant", "content": one.sentence or one.answer})
        return self.tokenizer.encode(self.render(messages[:-1]), add_special_tokens=False)

    def max_tokens(self, document: Document, turn: int) -> int:
        return CHAT_ANSWER

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return ()

    def right(self, output: str, answer: str) -> bool:
        return f" {_bare(answer)} " in f" {_bare(output)} "


def _bare(text: str) -> str:
    """Words alone: without punctuation at their ends, single spaces between them."""
    return " ".join(word.strip(".,;:!?\"'*()") for word in text.split())


ROUNDS = 12
SHORTEST = 32


def fit(
    name: str, task: Task, style: Style, count: Callable[[str], int], length: int, turns: int, seed: str
) -> Document:
    """The document of `seed` whose longest prompt and its answer take at most `length` tokens, and hardly fewer.

    Raises:
        ConfigError: the task cannot be as short as that.
    """
    best: Document | None = None
    room = max(length - 40 * turns, length // 2)
    for _ in range(ROUNDS):
        try:
            document = task(Random(seed), Room(max(room, SHORTEST), turns, count))
        except TooShort as error:
            if best is not None:
                break
            raise ConfigError(f"--lengths {length} is too short for {name}: {error}") from None
        last = turns - 1
        taken = len(style.prompt(document, last, True)) + max(style.max_tokens(document, t) for t in range(turns))
        if taken <= length:
            best = document
            if length - taken < SHORTEST:
                break
        room += length - taken - (taken > length) * 4
    if best is None:
        raise ConfigError(f"--lengths {length} is too short for {name} with {turns} turns")
    return best
