"""What was measured of served requests, and the figures made of it. For simulated runs and for real servers alike.

Knows no scheduler and no clock. Times are seconds, of whatever clock the caller has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(slots=True, eq=False)
class Served:
    """One request and what became of it. NaN: it never came to that."""

    job: int
    turn: int
    arrival: float
    prompt: int
    output: int = 0
    """Tokens generated so far."""
    tenant: str = ""
    started: float = math.nan
    """The first step that computed for it began."""
    first: float = math.nan
    """The first token was there."""
    finish: float = math.nan
    cached: int = 0
    """Prompt tokens whose KV was found."""
    recomputed: int = 0
    """Tokens computed again after preemptions."""
    preemptions: int = 0
    last_turn: bool = True
    aborted: bool = False

    @property
    def done(self) -> bool:
        return self.finish == self.finish and not self.aborted

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.first - self.arrival

    @property
    def tpot(self) -> float:
        """Time per token after the first; NaN for a single one."""
        return (self.finish - self.first) / (self.output - 1) if self.output > 1 else math.nan

    @property
    def latency(self) -> float:
        return self.finish - self.arrival

    @property
    def queueing(self) -> float:
        return self.started - self.arrival


class Gaps:
    """Times between consecutive tokens of a request, over all requests: values with how often each occurred."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.counts: list[int] = []

    def add(self, seconds: float, count: int = 1) -> None:
        self.seconds.append(seconds)
        self.counts.append(count)

    def extend(self, seconds: Iterable[float]) -> None:
        for gap in seconds:
            self.add(gap)

    def merge(self, other: Gaps) -> None:
        self.seconds += other.seconds
        self.counts += other.counts

    def figures(self) -> dict[str, float]:
        """mean, p50, p90, p99, p99.9 and max of the time between tokens."""
        if not self.seconds:
            return {}
        values, counts = np.array(self.seconds), np.array(self.counts)
        order = np.argsort(values)
        values, below = values[order], np.cumsum(counts[order])
        shares = {f"tbt_p{share:g}_s": share for share in (*PERCENTILES, 99.9)}
        at = {name: int(np.searchsorted(below, below[-1] * share / 100)) for name, share in shares.items()}
        return {
            "tbt_mean_s": float(np.dot(self.seconds, self.counts) / below[-1]),
            **{name: float(values[min(i, len(values) - 1)]) for name, i in at.items()},
            "tbt_max_s": float(values[-1]),
        }


@dataclass(frozen=True)
class SLO:
    """What a request must meet to count: time to first token and mean time per further token, in seconds."""

    ttft: float = 2.0
    tpot: float = 0.1

    def deadline(self, arrival: float, output: int) -> float:
        """When an answer of `output` tokens is complete that just meets it."""
        return arrival + self.ttft + self.tpot * output

    def met(self, served: Served) -> bool:
        return served.done and served.ttft <= self.ttft and not served.tpot > self.tpot


@dataclass
class Run:
    """Everything measured in one run. `totals`: counters of the serving side, by name."""

    served: list[Served]
    gaps: Gaps = field(default_factory=Gaps)
    totals: dict[str, float] = field(default_factory=dict)
    refused: int = 0


def spread(name: str, values: Sequence[float], unit: str = "s") -> dict[str, float]:
    """mean, p50, p90 and p99 as `name_mean_unit` ...; nothing for no values. NaNs do not count."""
    array = np.asarray(values, float)
    array = array[~np.isnan(array)]
    if not array.size:
        return {}
    points = np.percentile(array, PERCENTILES, method="higher")
    return {
        f"{name}_mean_{unit}": float(array.mean()),
        **{f"{name}_p{share}_{unit}": float(at) for share, at in zip(PERCENTILES, points, strict=True)},
    }


def job_times(served: Iterable[Served]) -> list[float]:
    """Completion times of jobs: from the first turn's arrival to the last turn's end. Unfinished jobs are left out."""
    begin: dict[int, float] = {}
    end: dict[int, float] = {}
    for one in served:
        begin[one.job] = min(begin.get(one.job, math.inf), one.arrival)
        if one.last_turn and one.done:
            end[one.job] = one.finish
    return [finish - begin[job] for job, finish in end.items()]


def shares(served: Sequence[Served]) -> dict[str, float]:
    """What part of the service each tenant got while all of them sent requests. A prompt token counts 1, a generated
    one 2, as in VTC."""
    last: dict[str, float] = {}
    for one in served:
        last[one.tenant] = max(last.get(one.tenant, -math.inf), one.arrival)
    end, given = min(last.values()), dict.fromkeys(last, 0)
    for one in served:
        if one.done and one.finish <= end:
            given[one.tenant] += one.prompt + 2 * one.output
    return {tenant: tokens / max(1, sum(given.values())) for tenant, tokens in given.items()}


def figures(run: Run, slo: SLO | None = None) -> dict[str, float]:
    """Every figure of a run by name; the unit is the name's last part.

    jct is per job (all turns of a session, tools included), all else per request. norm is latency per output token.
    """
    slo = slo or SLO()
    done = [one for one in run.served if one.done]
    result: dict[str, float] = {
        "requests": len(run.served) + run.refused,
        "finished": len(done),
        "refused": run.refused,
        "aborted": sum(one.aborted for one in run.served),
    }
    if not done:
        return result
    seconds = max(one.finish for one in done) - min(one.arrival for one in run.served)
    prompt, output = sum(one.prompt for one in done), sum(one.output for one in done)
    attained = sum(slo.met(one) for one in done)
    times = job_times(run.served)
    result |= {
        "seconds": seconds,
        "requests_per_s": len(done) / seconds,
        "jobs_per_s": len(times) / seconds,
        "prompt_tokens": prompt,
        "new_tokens": output,
        "new_tokens_per_s": output / seconds,
        **spread("jct", times),
        **spread("latency", [one.latency for one in done]),
        **spread("ttft", [one.ttft for one in done]),
        **spread("tpot", [one.tpot for one in done]),
        **run.gaps.figures(),
        **spread("queue", [one.queueing for one in done]),
        **spread("norm", [one.latency / max(1, one.output) for one in done], "s_per_token"),
        "slo_attainment": attained / len(run.served),
        "goodput_per_s": attained / seconds,
        "preemptions": sum(one.preemptions for one in run.served),
        "recomputed_tokens": sum(one.recomputed for one in run.served),
        "prefix_hit_tokens": sum(one.cached for one in done),
        "prefix_hit_share": sum(one.cached for one in done) / prompt,
    }
    return result | run.totals


def interval(values: Sequence[float], confidence: float = 0.95, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and its bootstrap confidence interval (percentile method, own fixed seed). One value has no interval."""
    array = np.asarray(values, float)
    if array.size < 2:
        return float(array.mean()), math.nan, math.nan
    draws = np.random.default_rng(0).choice(array, (resamples, array.size)).mean(axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(draws, (tail, 100 - tail))
    return float(array.mean()), float(low), float(high)


def across(runs: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float, float]]:
    """`interval` of each figure that all runs have."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: interval([run[name] for run in runs]) for name in names}
