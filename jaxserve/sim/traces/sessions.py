"""What the readers of agent traces share: from the calls of sessions to jobs. Knows no file format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

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
