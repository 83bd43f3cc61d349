"""What a task generates: a context and questions about it, with their answers. Knows no tokenizer and no engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Turn:
    """A question and its golden answer.

    depth: where the answer lies in the context, from 0 (beginning) to 1 (end).
    sentence: the golden answer as a chat would say it; empty: as `answer`.
    """

    question: str
    answer: str
    depth: float
    sentence: str = ""


@dataclass(frozen=True)
class Document:
    """A context and the turns that ask about it.

    cue: how a question is put after plain text, up to where the answer begins.
    request: how it is put to a chat model.
    extra_tokens: how many tokens more than the golden answer's may be generated, so that a longer answer shows.
    """

    context: str
    turns: tuple[Turn, ...]
    cue: str = "Q: {}\nA:"
    request: str = "{}"
    extra_tokens: int = 2


@dataclass(frozen=True)
class Room:
    """What a document may take: about `tokens` tokens of context, and exactly `turns` turns. `count(text)` is the
    number of tokens of a text."""

    tokens: int
    turns: int
    count: Callable[[str], int]


Task = Callable[[Random, Room], Document]
"""A pure function of its random source: the same seed and room give the same document.

Raises:
    TooShort: the room cannot hold what the turns ask for.
"""


class TooShort(ValueError):
    """A context length at which a task has no document."""


def spread(rng: Random, count: int, turns: int) -> list[int]:
    """`turns` different indices below `count`, one from each of `turns` equal slices, in random order: every depth is
    asked for equally often."""
    if count < turns:
        raise TooShort(f"there is room for {count} facts, and {turns} turns ask for one each")
    chosen = [rng.randrange(i * count // turns, (i + 1) * count // turns) for i in range(turns)]
    rng.shuffle(chosen)
    return chosen


class Page:
    """A context in the making: pieces of text with their tokens counted."""

    def __init__(self, count: Callable[[str], int]):
        self._count = count
        self._pieces: list[str] = []
        self._starts: list[int] = []
        self.tokens = 0

    def add(self, piece: str) -> None:
        self._pieces.append(piece)
        self._starts.append(self.tokens)
        self.tokens += self._count(" " + piece)

    def depth(self, piece: int) -> float:
        """Where piece number `piece` begins, as a share of the whole."""
        return self._starts[piece] / max(self.tokens, 1)

    def text(self, separator: str = " ") -> str:
        return separator.join(self._pieces)


def hide(rng: Random, room: Room, facts: list[str], filler: Callable[[], str]) -> tuple[str, list[float]]:
    """`facts` in their order at evenly spread places between sentences of `filler`: (context, depth of each fact)."""
    left = room.tokens - sum(room.count(" " + fact) for fact in facts)
    sentences: list[str] = []
    while left > 0:
        sentence = filler()
        left -= room.count(" " + sentence)
        if left >= 0:
            sentences.append(sentence)
    slots = len(sentences) + 1
    at = [int((i + rng.random()) * slots / len(facts)) for i in range(len(facts))]
    page, depths = Page(room.count), []
    for place in range(slots):
        for fact in (fact for fact, where in zip(facts, at, strict=True) if where == place):
            depths.append(page.tokens)
            page.add(fact)
        if place < len(sentences):
            page.add(sentences[place])
    return page.text(), [start / max(page.tokens, 1) for start in depths]
