"""What arrives: jobs of one or several turns, with the lengths of their texts and what their prompts have in common.

Knows no text, no tokens, no file format, no engine. The same traces drive the simulator and `jaxserve bench serve`.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from jaxserve.types import PAGE_TOKENS

Span = tuple[int, int]
"""(end, label): tokens up to position `end`, from where the span before it ended, are those that `label` stands for."""

OPEN_END = 1 << 40
"""End of a span that also covers whatever is generated after the prompt."""


class Turn(msgspec.Struct, frozen=True, gc=False):
    """One request of a job.

    `spans` say which content the prompt has, for prefix reuse: two turns share a prefix exactly as far as their spans
    agree. Without them it is like no other. `think_s`: seconds from the end of the turn before to this request (a tool
    runs, a person reads); `tool` names what ran then.
    """

    prompt: int
    output: int
    spans: tuple[Span, ...] = ()
    think_s: float = 0.0
    tool: str = ""


class Job(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A plain request (one turn) or a session. `patience_s`: the client goes away if the answer takes longer."""

    arrival: float
    turns: tuple[Turn, ...]
    tenant: str = ""
    priority: int = 0
    patience_s: float = math.inf
    copy: int = 0
    """Jobs of different copies share nothing, whatever their spans say: a trace that is played twice must not find its
    own prefixes."""


@dataclass(frozen=True)
class Trace:
    """Jobs in order of arrival."""

    name: str
    jobs: tuple[Job, ...]

    def __post_init__(self) -> None:
        if not self.jobs:
            raise ValueError(f"trace {self.name} has no requests")

    @property
    def requests(self) -> int:
        return sum(len(job.turns) for job in self.jobs)

    @property
    def rate(self) -> float:
        """Jobs a second; inf when all arrive at once."""
        seconds = self.jobs[-1].arrival - self.jobs[0].arrival
        return (len(self.jobs) - 1) / seconds if seconds > 0 else math.inf

    @property
    def turns(self) -> Iterator[Turn]:
        return (turn for job in self.jobs for turn in job.turns)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and output together."""
        return max(turn.prompt + turn.output for turn in self.turns)

    def shrunk(self, factor: float) -> Trace:
        """The same with all lengths times `factor`, for models that hold less than the trace's."""
        return replace(self, jobs=tuple(_shrunk(job, factor) for job in self.jobs)) if factor != 1 else self


def _shrunk(job: Job, factor: float) -> Job:
    turns = tuple(
        Turn(
            max(1, round(turn.prompt * factor)),
            max(1, round(turn.output * factor)),
            tuple((end if end == OPEN_END else int(end * factor), label) for end, label in turn.spans),
            turn.think_s,
            turn.tool,
        )
        for turn in job.turns
    )
    return msgspec.structs.replace(job, turns=turns)


def together(name: str, tenants: Mapping[str, Trace]) -> Trace:
    """The jobs of several tenants, by arrival."""
    jobs = [msgspec.structs.replace(job, tenant=tenant) for tenant, trace in tenants.items() for job in trace.jobs]
    return Trace(name, tuple(sorted(jobs, key=lambda job: job.arrival)))


Gaps = Callable[[random.Random], float]
"""Draws a time between two arrivals, of mean 1."""


def poisson(draw: random.Random) -> float:
    return draw.expovariate(1.0)


def gamma(cv: float) -> Gaps:
    """Gamma-distributed gaps: burstier than Poisson where the coefficient of variation `cv` is above 1."""
    if cv <= 0:
        raise ValueError(f"a coefficient of variation of {cv} is not above 0")
    shape = 1 / cv**2
    return lambda draw: draw.gammavariate(shape, 1 / shape)


def sample(trace: Trace, jobs: int, rate: float, seed: int, gaps: Gaps | None = None) -> Trace:
    """`jobs` consecutive jobs of the trace from a place that `seed` chooses, at `rate` jobs a second.

    `gaps` None keeps the trace's own rhythm, scaled; otherwise arrival times are drawn. What is consecutive stays so,
    because neighbours share prefixes. A trace with fewer jobs starts over, as another copy.

    Raises:
        ValueError: the trace has no arrival times to scale.
    """
    draw = random.Random(seed)
    have = len(trace.jobs)
    first = draw.randrange(have)
    picked = [(trace.jobs[(first + i) % have], (first + i) // have) for i in range(jobs)]
    if gaps is None:
        times = _own_rhythm(trace, first, jobs)
        if jobs > 1 and times[-1] == 0:
            raise ValueError(f"trace {trace.name} has no arrival times to scale; draw them (poisson or gamma)")
        scale = (jobs - 1) / rate / times[-1] if jobs > 1 else 0.0
        arrivals = [time * scale for time in times]
    else:
        arrivals, now = [], 0.0
        for _ in range(jobs):
            arrivals.append(now)
            now += gaps(draw) / rate
    return Trace(
        trace.name,
        tuple(
            msgspec.structs.replace(job, arrival=arrival, copy=job.copy + copy)
            for (job, copy), arrival in zip(picked, arrivals, strict=True)
        ),
    )


def _own_rhythm(trace: Trace, first: int, jobs: int) -> list[float]:
    times = [job.arrival for job in trace.jobs]
    # One more gap, of mean length, between the end of the trace and its start over.
    lap = (times[-1] - times[0]) * len(times) / max(1, len(times) - 1)
    laps = ((first + i) // len(times) for i in range(jobs))
    absolute = [times[(first + i) % len(times)] + lap * n for i, n in enumerate(laps)]
    return [time - absolute[0] for time in absolute]


_pack = struct.Struct("<qii").pack


def page_names(turn: Turn, copy: int, first: int, end: int) -> tuple[bytes, ...]:
    """Names of pages [first, end) of a turn's sequence, up to the first page that no span covers: equal exactly where
    the content up to the page's end is."""
    names: list[bytes] = []
    spans = iter(turn.spans)
    stop, label = next(spans, (0, 0))
    for page in range(first, end):
        reach = (page + 1) * PAGE_TOKENS
        while stop < reach:
            stop, label = next(spans, (-1, 0))
            if stop < 0:
                return tuple(names)
        names.append(_pack(label, page, copy))
    return tuple(names)


def common_tokens(a: tuple[Span, ...], b: tuple[Span, ...], most: int) -> int:
    """Leading tokens, up to `most`, in which contents `a` and `b` agree."""
    common = 0
    for (end, label), (other_end, other) in zip(a, b, strict=False):
        if label != other:
            break
        common = min(end, other_end)
        if end != other_end:
            break
    return min(common, most)


def session_spans(lengths: Sequence[int], shared: Sequence[int], labels: Iterator[int]) -> list[tuple[Span, ...]]:
    """Spans of a session's turns: turn k has `lengths[k]` prompt tokens, the first `shared[k]` of which are those of
    turn k-1's prompt and answer. Every turn's own part gets the next of `labels`, which must be unique in a trace."""
    made: list[tuple[Span, ...]] = []
    before: tuple[Span, ...] = ()
    for common in shared[: len(lengths)]:
        kept = []
        for end, label in before:
            kept.append((min(end, common), label))
            if end >= common:
                break
        before = (*(span for span in kept if span[0] > 0), (OPEN_END, next(labels)))
        made.append(before)
    return made
