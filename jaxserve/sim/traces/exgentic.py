"""Exgentic agent-llm-traces: LLM calls of SWE-bench agent runs with times and token counts, normalised.

https://huggingface.co/datasets/Exgentic/agent-llm-traces: JSONL with session_id, start_time_s, end_time_s,
input_tokens, output_tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from jaxserve.sim.traces.sessions import Call, by_session, jobs
from jaxserve.sim.workload import Job


class _Row(msgspec.Struct):
    session_id: str
    start_time_s: float
    end_time_s: float
    input_tokens: int
    output_tokens: int


def matches(head: str) -> bool:
    return '"span_kind"' in head and '"start_time_s"' in head


def read(lines: Iterator[str]) -> Iterator[Job]:
    sessions = by_session(map(msgspec.json.Decoder(_Row).decode, lines), lambda row: row.start_time_s)
    return jobs((rows[0].start_time_s, _calls(rows)) for rows in sessions)


def _calls(rows: list[_Row]) -> list[Call]:
    """A prompt that has grown is taken to begin with the one before and its answer, a shorter one to begin anew. Calls
    that overlapped follow one another."""
    calls: list[Call] = []
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None:
            calls.append(Call(row.input_tokens, row.output_tokens))
            continue
        grown = row.input_tokens >= before.input_tokens
        shared = min(row.input_tokens, before.input_tokens + before.output_tokens) if grown else 0
        think = max(0.0, row.start_time_s - before.end_time_s)
        calls.append(Call(row.input_tokens, row.output_tokens, shared, think))
    return calls
