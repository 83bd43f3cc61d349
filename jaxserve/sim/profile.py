"""A profile: how long the steps of a real engine took, and the cost model fitted to them. Reads records of runs.

Knows no engine: the record that `--record` writes holds every plan and the duration of every step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np

from jaxserve.engine.shapes import EngineShape
from jaxserve.scheduler import Limits
from jaxserve.scheduler.record import EVENT, HEADER, PLAN, Header, frames
from jaxserve.sim.cost import Features, Fitted, features, terms_of
from jaxserve.sim.machine import Machine
from jaxserve.types import PAGE_TOKENS, Event, PageClasses, Plan, StepDone

VERSION = 4
OUTLIER = 3.0
"""A step that took so many times the median of its like was interrupted by something else."""

FIT_ROUNDS = 8
HUBER = 3.0
"""Errors above so many times their median count less."""


class Timed(msgspec.Struct, frozen=True, array_like=True):
    """Steps with about the same features, the mean of their durations, and how many there were."""

    step: Features
    seconds: float
    count: int = 1


class Residual(msgspec.Struct, frozen=True):
    """How well the fit does on the steps of one bucket: mean measured and predicted seconds, and the mean absolute
    error of a group of like steps, as a share of the measured."""

    bucket: tuple[int, int]
    count: int
    measured: float
    predicted: float
    error: float


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What `jaxserve profile` writes. `about`: model, device, versions, date, as texts. `beat_s`: prices are those of a
    machine on which a beat of the metronome (cli/metronome.py) takes so long; 0: nobody listened."""

    version: int
    about: dict[str, str]
    shape: dict[str, int | tuple[int, ...]]
    limits: Limits
    groups: tuple[PageClasses, ...]
    steps: tuple[Timed, ...]
    terms: dict[str, float]
    beat_s: float = 0.0

    @property
    def engine_shape(self) -> EngineShape:
        return EngineShape(**self.shape)  # type: ignore[arg-type]

    def machine(self) -> Machine:
        """A replica that costs what was measured."""
        return Machine(
            name=f"{self.about.get('model', 'engine')} on {self.about.get('device', 'this machine')} (profile)",
            shape=self.engine_shape,
            limits=self.limits,
            groups=self.groups,
            cost=Fitted(terms=self.terms),
        )

    def residuals(self) -> list[Residual]:
        cost = Fitted(terms=self.terms)
        buckets: dict[tuple[int, int], list[Timed]] = {}
        for timed in self.steps:
            buckets.setdefault(timed.step.bucket, []).append(timed)
        made = []
        for bucket, group in sorted(buckets.items()):
            count = sum(timed.count for timed in group)
            measured = sum(timed.seconds * timed.count for timed in group)
            predicted = [cost.step_s(timed.step) for timed in group]
            off = sum(abs(p - t.seconds) * t.count for p, t in zip(predicted, group, strict=True))
            total = sum(p * t.count for p, t in zip(predicted, group, strict=True))
            made.append(Residual(bucket, count, measured / count, total / count, off / measured))
        return made


def read_header(record: bytes) -> Header:
    """How the scheduler of a recorded run was made.

    Raises:
        ValueError: this is no record.
    """
    kind, body = next(frames(record), (b"", b""))
    if kind != HEADER:
        raise ValueError("this is not a record of a scheduler: it does not begin with a header")
    return msgspec.msgpack.decode(body, type=Header)


def timed_steps(
    record: bytes, shape: EngineShape, warm_up: int = 2, pace: Callable[[int], float] = lambda step: 1.0
) -> list[Timed]:
    """Every step of a record with its duration, but the first `warm_up` of each bucket. `pace`: by how much the machine
    was slower at a step than what is to be known."""
    plans = msgspec.msgpack.Decoder(Plan)
    events = msgspec.msgpack.Decoder(Event)
    waiting: dict[int, Features] = {}
    seen: dict[tuple[int, int], int] = {}
    before: Features | None = None
    made: list[Timed] = []
    for kind, body in frames(record):
        if kind == PLAN:
            plan = plans.decode(body)
            if plan.has_work:
                waiting[plan.step] = before = features(plan, shape, before, alone=not waiting)
        elif kind == EVENT:
            event = events.decode(body)
            if isinstance(event, StepDone):
                step = waiting.pop(event.step)
                seen[step.bucket] = seen.get(step.bucket, 0) + 1
                if seen[step.bucket] > warm_up:
                    made.append(Timed(step, event.duration / pace(event.step)))
    return made


def grouped(steps: Iterable[Timed]) -> list[Timed]:
    """Like steps together: same programs, same admissions, contexts within a page. Outliers are left out."""
    groups: dict[tuple, list[Timed]] = {}
    for timed in steps:
        step = timed.step
        key = (
            step.bucket,
            step.head,
            step.admits,
            step.longest // PAGE_TOKENS,
            step.context // (4 * PAGE_TOKENS),
            step.tile_longest // PAGE_TOKENS,
            step.tile_context // (4 * PAGE_TOKENS),
            step.since_tiles,
            step.rows,
            step.tile_tokens // PAGE_TOKENS,
            step.alone,
        )
        groups.setdefault(key, []).append(timed)
    return [_merged(group) for group in groups.values()]


def _merged(group: Sequence[Timed]) -> Timed:
    middle = statistics.median(timed.seconds for timed in group)
    usual = [timed for timed in group if timed.seconds <= OUTLIER * middle]
    first = usual[0].step
    means = [round(statistics.fmean(values)) for values in zip(*(timed.step[2:] for timed in usual), strict=True)]
    step = Features(first.bucket, first.head, *means)
    return Timed(step, statistics.fmean(timed.seconds for timed in usual), len(usual))


def fit(steps: Sequence[Timed]) -> dict[str, float]:
    """Robust non-negative least squares: a term a bucket, a head, and what attention reads.

    Errors count as shares of what is usual in their bucket. When the host is interrupted, one step seems long and the
    next one short: what is off by several times the usual error is weighed down (Huber), in a few rounds.

    Raises:
        ValueError: there are no steps.
    """
    from scipy.optimize import nnls

    if not steps:
        raise ValueError("a profile without steps cannot be fitted")
    names = list(dict.fromkeys(name for timed in steps for name, _ in terms_of(timed.step)))
    column = {name: i for i, name in enumerate(names)}
    matrix = np.zeros((len(steps), len(names)))
    for row, timed in enumerate(steps):
        for name, amount in terms_of(timed.step):
            matrix[row, column[name]] = amount
    seconds = np.array([timed.seconds for timed in steps])
    usual = _usual(steps)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
    weights = np.sqrt([timed.count for timed in steps]) / usual
    trust = np.ones(len(steps))
    for _ in range(FIT_ROUNDS):
        each = weights * np.sqrt(trust)
        found, _ = nnls((matrix / scale) * each[:, None], seconds * each, maxiter=100 * len(names))
        errors = np.abs(matrix @ (found / scale) - seconds) / usual
        bound = HUBER * max(float(np.median(errors)), 1e-9)
        trust = np.minimum(1.0, bound / np.maximum(errors, 1e-12))
    # A record may have no such steps; whoever simulates it will.
    unknown = {f"after tiles[{timed.step.bucket[0]}]": 0.0 for timed in steps if not timed.step.bucket[1]}
    return {"alone": 0.0} | unknown | dict(zip(names, (found / scale).tolist(), strict=True))


def interruptions(steps: Sequence[Timed], terms: Mapping[str, float]) -> float:
    """How much longer all steps took than they cost undisturbed, which is what a fit says: the host was interrupted,
    and that comes to a step as often as it is long."""
    cost = Fitted(terms=dict(terms))
    return sum(timed.seconds * timed.count for timed in steps) / sum(cost.step_s(one.step) * one.count for one in steps)


def _usual(steps: Sequence[Timed]) -> np.ndarray:
    """The median duration in the bucket of each step."""
    buckets: dict[tuple[int, int], list[float]] = {}
    for timed in steps:
        buckets.setdefault(timed.step.bucket, []).append(timed.seconds)
    return np.array([statistics.median(buckets[timed.step.bucket]) for timed in steps])


def make_profile(
    record: bytes,
    shape: EngineShape,
    about: dict[str, str],
    warm_up: int = 2,
    pace: Callable[[int], float] = lambda step: 1.0,
    beat_s: float = 0.0,
) -> Profile:
    """The profile of a recorded run of an engine with these shapes. `pace` as in `timed_steps`, `beat_s` as kept."""
    timed = timed_steps(record, shape, warm_up, pace)
    steps = grouped(timed)
    terms = fit(steps)
    level = interruptions(timed, terms)
    header = read_header(record)
    return Profile(
        version=VERSION,
        about=about,
        shape=asdict(shape),
        limits=header.limits,
        groups=header.groups,
        steps=tuple(steps),
        terms={name: level * price for name, price in terms.items()},
        beat_s=beat_s,
    )


def write_profile(profile: Profile, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")


def read_profile(path: Path) -> Profile:
    """
    Raises:
        OSError: the file cannot be read.
        ValueError: it is no profile, or one of another version.
    """
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is not a profile of `jaxserve profile`: {error}") from None
    if profile.version != VERSION:
        raise ValueError(f"{path} is a profile of version {profile.version}; this program reads version {VERSION}")
    return profile
