"""Policies x loads x seeds over one trace: what to run, running it, and figures with confidence intervals.

Knows no files and prints nothing. Load 1.0 is the capacity of the machine for the trace, see `capacity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from jaxserve.scheduler import Policy, make_policy
from jaxserve.sim.dispatch import make_dispatch
from jaxserve.sim.machine import OPTIONS, Machine
from jaxserve.sim.metrics import SLO, across, figures, job_times
from jaxserve.sim.replica import Sample
from jaxserve.sim.simulation import Simulated, Simulation
from jaxserve.sim.workload import Gaps, Trace, gamma, poisson, sample

CAPACITY_REQUESTS = 1000
CURVE_POINTS = 200
TIMELINE_POINTS = 400


@dataclass(frozen=True)
class PolicySpec:
    """A policy with its parameters and, where it wants other ones, the engine options it runs with."""

    text: str
    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> PolicySpec:
        """`name`, or `name:key=value:...`; keys are parameters of the policy or engine options (OPTIONS in
        machine.py).

        Raises:
            ValueError: it cannot be read, or there is no such policy or parameter.
        """
        name, *parts = text.split(":")
        params: dict[str, Any] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"{text!r}: {part!r} is not key=value")
            params[key] = _value(value)
        options = {key: params.pop(key) for key in OPTIONS if key in params}
        spec = cls(text, name, params, options)
        spec.make()
        return spec

    def make(self) -> Policy:
        return make_policy(self.name, **self.params)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


@dataclass(frozen=True)
class Setting:
    """Everything about a run but its policy, load and seed.

    `arrivals`: `trace` (its own rhythm, scaled), `poisson`, or `gamma/CV`. `max_tokens`: see Simulation.
    """

    trace: Trace
    machine: Machine
    jobs: int
    arrivals: str = "trace"
    replicas: int = 1
    dispatch: str = "round-robin"
    max_tokens: int | None = None
    programs: bool = True
    """Whether sessions say which program they are, so that their pages can be held between turns."""
    slo: SLO = SLO()

    def __post_init__(self) -> None:
        gaps_of(self.arrivals)
        make_dispatch(self.dispatch)
        if self.arrivals == "trace" and math.isinf(self.trace.rate):
            raise ValueError(
                f"trace {self.trace.name} has no arrival times; draw them with arrivals poisson or gamma/CV"
            )

    def simulation(self, policy: PolicySpec, trace: Trace, **more: Any) -> Simulation:
        machine = self.machine.with_options(**policy.options) if policy.options else self.machine
        return Simulation(
            trace,
            machine,
            policy.make,
            replicas=self.replicas,
            dispatch=make_dispatch(self.dispatch),
            max_tokens=self.max_tokens,
            programs=self.programs,
            slo=self.slo,
            **more,
        )

    def run(self, policy: PolicySpec, rate: float, seed: int, **more: Any) -> Simulated:
        """One run at `rate` jobs a second."""
        trace = sample(self.trace, self.jobs, rate, seed, gaps_of(self.arrivals))
        return self.simulation(policy, trace, **more).run()


def gaps_of(arrivals: str) -> Gaps | None:
    """
    Raises:
        ValueError: it cannot be read.
    """
    kind, _, number = arrivals.partition("/")
    if kind == "trace":
        return None
    if kind == "poisson":
        return poisson
    if kind == "gamma":
        try:
            return gamma(float(number))
        except ValueError:
            pass
    raise ValueError(f"arrivals {arrivals!r} are none of trace, poisson, gamma/CV (as gamma/2)")


def capacity(setting: Setting, policy: PolicySpec | None = None) -> float:
    """Jobs a second that the machine completes at best when it never runs out of them, under `sarathi` unless another
    policy is named.

    So many clients each have their next job when the last is done: one a slot for plain requests. Sessions think, and
    too many of them push each other's pages out, so the number that completes most is looked for.
    """
    policy = policy or PolicySpec.parse("sarathi")
    slots = setting.machine.shape.slots * setting.replicas
    sessions = setting.trace.requests > len(setting.trace.jobs)
    numbers = {max(1, slots // share) for share in (8, 4, 2, 1)} if sessions else {slots}
    return max(_completed(setting, policy, clients) for clients in numbers)


def _completed(setting: Setting, policy: PolicySpec, clients: int) -> float:
    """Jobs a second with so many clients, between the end of the first tenth and the start of the last job."""
    turns = setting.trace.requests / len(setting.trace.jobs)
    jobs = max(4 * clients, round(CAPACITY_REQUESTS / turns))
    run = setting.simulation(policy, sample(setting.trace, jobs, 1.0, 0, poisson), clients=clients).run()
    ends = sorted(one.finish for one in run.served if one.last_turn or one.aborted)
    if not ends:
        kv_tokens = setting.machine.kv_tokens
        raise ValueError(f"no request of trace {setting.trace.name} fits the machine (KV for {kv_tokens:,} tokens)")
    last_start = max(one.arrival for one in run.served if one.turn == 0)
    within = [end for end in ends[len(ends) // 10 :] if end <= last_start]
    if len(within) < 2 or within[-1] <= within[0]:
        return len(ends) / ends[-1]
    return (len(within) - 1) / (within[-1] - within[0])


@dataclass(frozen=True)
class Bar:
    """What a machine must keep up at a rate to be said to serve it, as Sarathi-Serve asks: the p99 of the time between
    tokens, and the median of queueing, in seconds."""

    tbt_p99: float
    queue_p50: float = 2.0

    def met(self, run: Mapping[str, float]) -> bool:
        return run.get("tbt_p99_s", 0.0) <= self.tbt_p99 and run["queue_p50_s"] <= self.queue_p50


def highest_rate(setting: Setting, policy: PolicySpec, bar: Bar, seed: int, limit: float, steps: int = 8) -> float:
    """The highest rate (jobs a second, up to `limit`) at which the bar is met, by bisection to 1 / 2^steps of `limit`;
    0.0 if it is met at none."""
    low, high = 0.0, limit
    for _ in range(steps):
        middle = (low + high) / 2
        if bar.met(figures(setting.run(policy, middle, seed))):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class Cell:
    """One policy at one load: figures of each seed, and across seeds (mean, low, high)."""

    policy: str
    load: float
    rate: float
    runs: tuple[dict[str, float], ...]
    figures: dict[str, tuple[float, float, float]]
    jct_curve: tuple[float, ...]
    """Completion times of the first seed's jobs at evenly spaced shares from 0 to 1."""
    timeline: tuple[Sample, ...]
    """Of the first seed's first replica."""


@dataclass(frozen=True)
class _Task:
    setting: Setting
    policy: PolicySpec
    load: float
    rate: float
    seed: int


@dataclass(frozen=True)
class _Result:
    figures: dict[str, float]
    jct_curve: tuple[float, ...]
    timeline: tuple[Sample, ...]


def _run(task: _Task) -> _Result:
    expected = task.setting.jobs / task.rate
    run = task.setting.run(task.policy, task.rate, task.seed, sample_every=expected / TIMELINE_POINTS)
    times = sorted(job_times(run.served))
    curve = tuple(times[(len(times) - 1) * i // CURVE_POINTS] for i in range(CURVE_POINTS + 1)) if times else ()
    return _Result(figures(run, task.setting.slo), curve, run.timelines[0][: 4 * TIMELINE_POINTS])


def sweep(
    setting: Setting,
    policies: Iterable[PolicySpec],
    loads: Iterable[float],
    seeds: int,
    unit_rate: float,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[Cell]:
    """Every policy at every load; `unit_rate` is the rate of load 1.0. All policies see the same arrivals."""
    tasks = [
        _Task(setting, policy, load, load * unit_rate, seed)
        for load in loads
        for policy in policies
        for seed in range(seeds)
    ]
    results: list[_Result | None] = [None] * len(tasks)
    for done, (index, result) in enumerate(_results(tasks, workers), 1):
        results[index] = result
        progress(done, len(tasks))
    for first in range(0, len(tasks), seeds):
        task, of_seeds = tasks[first], [r for r in results[first : first + seeds] if r is not None]
        yield Cell(
            policy=task.policy.text,
            load=task.load,
            rate=task.rate,
            runs=tuple(result.figures for result in of_seeds),
            figures=across([result.figures for result in of_seeds]),
            jct_curve=of_seeds[0].jct_curve,
            timeline=of_seeds[0].timeline,
        )


def _results(tasks: list[_Task], workers: int) -> Iterator[tuple[int, _Result]]:
    if workers == 1 or len(tasks) == 1:
        yield from ((index, _run(task)) for index, task in enumerate(tasks))
        return
    # Fresh processes: the caller may have threads (jax has), which a fork would break.
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_run, task): index for index, task in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()
