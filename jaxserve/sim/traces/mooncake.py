"""Mooncake (Kimi) traces: lengths and prefix block hashes (FAST 2025).

https://github.com/kvcache-ai/Mooncake: JSONL with timestamp (ms), input_length, output_length, hash_ids. An id stands
for 512 tokens and all before them: two requests share a prefix exactly as far as their ids agree.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from jaxserve.sim.workload import Job, Turn

BLOCK_TOKENS = 512


class _Row(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def matches(head: str) -> bool:
    return '"hash_ids"' in head and '"input_length"' in head


def read(lines: Iterator[str]) -> Iterator[Job]:
    decode = msgspec.json.Decoder(_Row).decode
    first: float | None = None
    for line in lines:
        row = decode(line)
        first = row.timestamp if first is None else first
        spans = tuple((min((i + 1) * BLOCK_TOKENS, row.input_length), name) for i, name in enumerate(row.hash_ids))
        turn = Turn(row.input_length, max(1, row.output_length), spans)
        yield Job(arrival=(row.timestamp - first) / 1e3, turns=(turn,))
