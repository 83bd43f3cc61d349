"""LMCache agent traces: the whole text of every LLM call of agents (mini-SWE-agent, tau-bench, MagenticOne).

https://github.com/LMCache/lmcache-agent-trace: JSONL with timestamp (us, start of the call), input, output, session_id.
"""

from __future__ import annotations

from collections.abc import Iterator
from os.path import commonprefix

import msgspec

from jaxserve.sim.traces.sessions import CHARACTERS_PER_TOKEN, Call, jobs, tokens
from jaxserve.sim.workload import Job

SECONDS_PER_TOKEN = 0.02
"""The trace has no end times: a call is taken to have lasted that long per token of its answer, and the rest of the
time up to the next call is the tool's."""


class _Row(msgspec.Struct):
    timestamp: int
    input: str
    output: str
    session_id: str


def matches(head: str) -> bool:
    return head.startswith('{"timestamp"') and '"session_id"' in head and '"input"' in head


def read(lines: Iterator[str]) -> Iterator[Job]:
    decode = msgspec.json.Decoder(_Row).decode
    sessions: dict[str, list[_Row]] = {}
    for line in lines:
        row = decode(line)
        sessions.setdefault(row.session_id, []).append(row)
    return jobs((rows[0].timestamp / 1e6, _calls(rows)) for rows in map(_by_time, sessions.values()))


def _by_time(rows: list[_Row]) -> list[_Row]:
    return sorted(rows, key=lambda row: row.timestamp)


def _calls(rows: list[_Row]) -> list[Call]:
    calls: list[Call] = []
    before: _Row | None = None
    for row in rows:
        think, shared = 0.0, 0
        if before is not None:
            lasted = tokens(before.output) * SECONDS_PER_TOKEN
            think = max(0.0, (row.timestamp - before.timestamp) / 1e6 - lasted)
            shared = len(commonprefix((row.input, before.input + before.output))) // CHARACTERS_PER_TOKEN
        calls.append(Call(tokens(row.input), tokens(row.output), shared, think))
        before = row
    return calls
