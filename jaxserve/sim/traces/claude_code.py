"""Turns of coding-agent sessions (Claude Code): token counts, think times, number of cached-prefix blocks, normalised.

https://huggingface.co/datasets/semianalysisai/cc-traces-weka-no-subagents-051226: JSONL with session_id, turn_index,
input_tokens, output_tokens, think_time_s, block_hashes_count, block_size_tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from jaxserve.sim.traces.sessions import Call, by_session, jobs
from jaxserve.sim.workload import Job


class _Row(msgspec.Struct, kw_only=True):
    session_id: str
    turn_index: int
    input_tokens: int
    output_tokens: int
    think_time_s: float | None = None
    block_hashes_count: int
    block_size_tokens: int


def matches(head: str) -> bool:
    return '"think_time_s"' in head and '"block_hashes_count"' in head


def read(lines: Iterator[str]) -> Iterator[Job]:
    """The trace does not say when sessions began: all begin at once."""
    sessions = by_session(map(msgspec.json.Decoder(_Row).decode, lines), lambda row: row.turn_index)
    return jobs((0.0, _calls(rows)) for rows in sessions)


def _calls(rows: list[_Row]) -> list[Call]:
    """The number of blocks of a conversation grows with it; where it falls, the context was compacted or reset, and
    nothing is shared. Between turns a tool ran: think_time_s."""
    calls: list[Call] = []
    blocks = 0
    for row in rows:
        shared = min(blocks * row.block_size_tokens, row.input_tokens) if row.block_hashes_count >= blocks else 0
        calls.append(
            Call(row.input_tokens, row.output_tokens, shared, (row.think_time_s or 0.0) if calls else 0.0, "tool")
        )
        blocks = row.block_hashes_count
    return calls
