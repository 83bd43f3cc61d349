"""What the readers of agent traces share: from the calls of sessions to jobs. Knows no file format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol, TypeVar

from jaxserve.sim.workload import Job, Turn, session_spans

CHARACTERS_PER_TOKEN = 4
"""Traces that bring text are measured in tokens of this many characters: what English and code have with the
vocabularies of today, within a quarter."""


@dataclass(frozen=True)
class Call:
    """One LLM call of a session. `shared`: leading prompt tokens that are those of the call before and its answer.
    `think_s`: since the end of the call before."""

    prompt: int
    output: int
    shared: int = 0
    think_s: float = 0.0
    tool: str = ""


class Row(Protocol):
    """A line of a trace that has one for each call."""

    @property
    def session_id(self) -> str: ...
    @property
    def input_tokens(self) -> int: ...


R = TypeVar("R", bound=Row)


def by_session(rows: Iterable[R], position: Callable[[R], float]) -> list[list[R]]:
    """The calls of each session by rising `position`; those without a prompt are left out."""
    sessions: dict[str, list[R]] = {}
    for row in rows:
        if row.input_tokens > 0:
            sessions.setdefault(row.session_id, []).append(row)
    return [sorted(calls, key=position) for calls in sessions.values()]


def tokens(text: str) -> int:
    return max(1, -(-len(text) // CHARACTERS_PER_TOKEN))


def jobs(sessions: Iterable[tuple[float, list[Call]]]) -> Iterator[Job]:
    """Jobs of (arrival, calls), in order of arrival from 0 on."""
    labels = count(1)
    ordered = sorted((s for s in sessions if s[1]), key=lambda session: session[0])
    for arrival, calls in ordered:
        spans = session_spans([c.prompt for c in calls], [c.shared for c in calls], labels)
        turns = tuple(
            Turn(call.prompt, max(1, call.output), spans_, call.think_s, call.tool)
            for call, spans_ in zip(calls, spans, strict=True)
        )
        yield Job(arrival=arrival - ordered[0][0], turns=turns)
