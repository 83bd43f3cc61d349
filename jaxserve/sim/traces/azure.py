"""Azure LLM inference traces (2023 and 2024): arrival times and lengths of single requests.

https://github.com/Azure/AzurePublicDataset: CSV with TIMESTAMP (UTC), ContextTokens, GeneratedTokens.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime

from jaxserve.sim.workload import Job, Turn


def matches(head: str) -> bool:
    return head.startswith("TIMESTAMP,ContextTokens,GeneratedTokens")


def read(lines: Iterator[str]) -> Iterator[Job]:
    first: float | None = None
    for row in csv.DictReader(lines):
        # Seven decimals in 2023; datetime reads six.
        time = datetime.fromisoformat(row["TIMESTAMP"].split("+")[0][:26]).timestamp()
        first = time if first is None else first
        turn = Turn(int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"])))
        yield Job(arrival=time - first, turns=(turn,))
