"""Prompt and answer lengths without arrival times, as Vidur's processed traces have them (arXiv summarisation, ...).

https://github.com/microsoft/vidur: CSV with num_prefill_tokens, num_decode_tokens.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from jaxserve.sim.workload import Job, Turn


def matches(head: str) -> bool:
    return head.startswith("num_prefill_tokens,num_decode_tokens")


def read(lines: Iterator[str]) -> Iterator[Job]:
    for row in csv.DictReader(lines):
        turn = Turn(int(float(row["num_prefill_tokens"])), max(1, int(float(row["num_decode_tokens"]))))
        yield Job(arrival=0.0, turns=(turn,))
