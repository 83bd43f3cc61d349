"""BurstGPT: requests to ChatGPT and GPT-4 from a campus, with failures (arXiv:2401.17644).

https://github.com/HPMLL/BurstGPT: CSV with Timestamp (s), Model, Request tokens, Response tokens, Log Type. Its
generator of synthetic load is the trace `burstgpt-generated` (synthetic.py).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from statistics import median

from jaxserve.sim.workload import Job, Turn

FAILURE_PATIENCE_S = 5.0
"""A request that failed has no answer in the trace. It is replayed as one with an answer of median length whose client
goes away after this time."""


def matches(head: str) -> bool:
    return head.startswith("Timestamp,") and "Request tokens" in head


def read(lines: Iterator[str]) -> Iterator[Job]:
    rows = list(csv.DictReader(lines))
    answers = [int(row["Response tokens"]) for row in rows]
    usual = int(median([n for n in answers if n] or [1]))
    first = float(rows[0]["Timestamp"]) if rows else 0.0
    for row, answer in zip(rows, answers, strict=True):
        arrival = float(row["Timestamp"]) - first
        prompt = max(1, int(row["Request tokens"]))
        if answer:
            yield Job(arrival=arrival, turns=(Turn(prompt, answer),), tenant=row["Model"])
        else:
            turn = Turn(prompt, usual)
            yield Job(arrival=arrival, turns=(turn,), tenant=row["Model"], patience_s=FAILURE_PATIENCE_S)
