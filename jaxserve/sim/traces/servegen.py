"""ServeGen: load generated from per-client statistics of a production service (arXiv:2505.09999).

https://github.com/alibaba/ServeGen, one client a JSON line: `trace` has rows [start_s, requests/s, cv, distribution of
gaps, its shape, its scale] for windows of ten minutes; `dataset` has length distributions by window start.
"""

from __future__ import annotations

import ast
import random
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import msgspec

from jaxserve.sim.workload import Job, Turn

WINDOW_S = 600.0
MOST_JOBS = 200_000


def matches(head: str) -> bool:
    return head.startswith('{"client"') and '"dataset"' in head


def read(lines: Iterator[str]) -> Iterator[Job]:
    """Requests of all clients. Gaps have the window's distribution and its rate, lengths are drawn independently."""
    jobs = [job for line in lines for job in _client(msgspec.json.decode(line))]
    jobs.sort(key=lambda job: job.arrival)
    first = jobs[0].arrival if jobs else 0.0
    for job in jobs[:MOST_JOBS]:
        yield msgspec.structs.replace(job, arrival=job.arrival - first)


def _client(client: dict[str, Any]) -> Iterator[Job]:
    draw = random.Random(int(client["client"]))
    lengths = {float(start): _lengths(fields) for start, fields in client["dataset"].items()}
    starts = sorted(start for start, known in lengths.items() if known is not None)
    if not starts:
        return
    tenant = f"client {client['client']}"
    for row in client["trace"]:
        begin, rate, _, kind, shape, _ = (field.strip() for field in row)
        if float(rate) <= 0:
            continue
        now = float(begin)
        prompts, answers = lengths[starts[max(0, bisect_right(starts, now) - 1)]]  # type: ignore[misc]
        while True:
            now += _gap(draw, kind, float(shape)) / float(rate)
            if now >= float(begin) + WINDOW_S:
                break
            yield Job(arrival=now, turns=(Turn(_pick(draw, prompts), _pick(draw, answers)),), tenant=tenant)


_Lengths = tuple[list[int], list[float]]


def _lengths(fields: dict[str, str]) -> tuple[_Lengths, _Lengths] | None:
    made = []
    for name in ("input_tokens", "output_tokens"):
        found = ast.literal_eval(fields[name])
        if not found:
            return None
        values = sorted(found)
        made.append((values, list(accumulate(found[value] for value in values))))
    return made[0], made[1]


def _pick(draw: random.Random, lengths: _Lengths) -> int:
    values, below = lengths
    return max(1, values[min(bisect_right(below, draw.random() * below[-1]), len(values) - 1)])


def _gap(draw: random.Random, kind: str, shape: float) -> float:
    """A gap of mean 1."""
    if kind == "Gamma":
        return draw.gammavariate(shape, 1 / shape)
    if kind == "Weibull":
        from math import gamma

        return draw.weibullvariate(1 / gamma(1 + 1 / shape), shape)
    return draw.expovariate(1.0)
