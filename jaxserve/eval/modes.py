"""In which order the questions of documents reach the engine, and what they share. Pure; knows no engine.

The modes are SCBench's (arXiv:2412.10319). A method that drops KV by what the first question needs looks well in
`single` and fails in the other two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SINGLE, MULTI_TURN, MULTI_REQUEST = "single", "multi-turn", "multi-request"
MODES = (SINGLE, MULTI_TURN, MULTI_REQUEST)


@dataclass(frozen=True)
class Ask:
    """One question put to the engine.

    history: earlier turns stand before it. scope: questions of one scope may share cached KV. last: no question of
    this document comes after it.
    """

    document: int
    turn: int
    history: bool
    scope: str
    last: bool


def waves(mode: str, documents: range, turns: int) -> Iterator[list[Ask]]:
    """The questions of `documents` in waves; all of a wave are queued at once, each wave after the end of the one
    before.

    single: each question with its context alone, nothing shared. multi-turn: turn by turn, golden answers of the
    earlier ones before each. multi-request: the first question of each document, then all others, which find the
    context cached.
    """
    match mode:
        case "single":
            yield [Ask(d, t, False, f"{d}/{t}", True) for d in documents for t in range(turns)]
        case "multi-turn":
            for t in range(turns):
                yield [Ask(d, t, True, f"{d}", t == turns - 1) for d in documents]
        case "multi-request":
            yield [Ask(d, 0, False, f"{d}", turns == 1) for d in documents]
            rest = [Ask(d, t, False, f"{d}", t == turns - 1) for d in documents for t in range(1, turns)]
            if rest:
                yield rest
        case _:
            raise ValueError(f"{mode!r} is not one of {', '.join(MODES)}")
