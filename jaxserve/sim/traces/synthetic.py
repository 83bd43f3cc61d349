"""Made-up load: lengths, sessions, shared prefixes and arrivals from distributions, reproducible from a seed.

A specification is `key=value,...`; lengths are `N`, `uniform/LOW/HIGH`, `lognormal/MEDIAN/SIGMA/CAP` or
`zipf/EXPONENT/CAP`.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import accumulate, count

from jaxserve.sim.workload import Job, Span, Turn, gamma, poisson, session_spans

Draw = Callable[[random.Random], int]


@dataclass(frozen=True)
class Synthetic:
    """What a synthetic trace consists of.

    Every job's prompt begins with one of `groups` prefixes of `prefix` tokens. Turns after the first bring `prompt`
    tokens more and `think_s` later (exponentially distributed). A share `failures` of clients goes away early. Gaps
    between jobs have mean 1 s and the coefficient of variation `cv`.
    """

    jobs: int = 1000
    prompt: str = "lognormal/256/1/8192"
    output: str = "lognormal/128/1/2048"
    turns: str = "1"
    think_s: float = 1.0
    prefix: int = 0
    groups: int = 1
    tenants: int = 1
    failures: float = 0.0
    cv: float = 1.0
    seed: int = 0


PRESETS: dict[str, tuple[Synthetic, str]] = {
    "synthetic": (Synthetic(), "lognormal prompts and answers; takes key=value changes"),
    "heavy-tail": (
        Synthetic(prompt="lognormal/128/0.5/1024", output="lognormal/32/2/2048"),
        "short answers, a few very long ones (service times with CV above 2)",
    ),
    "light-tail": (
        Synthetic(prompt="lognormal/512/0.5/2048", output="uniform/128/384"),
        "answers of similar length",
    ),
    "long-prompts": (
        Synthetic(prompt="lognormal/4000/0.6/14000", output="lognormal/128/0.7/512"),
        "documents to summarise",
    ),
    "agents": (
        Synthetic(
            jobs=200,
            prompt="lognormal/200/0.8/2000",
            output="lognormal/80/0.7/512",
            turns="uniform/4/12",
            think_s=1.0,
            prefix=1500,
            groups=2,
        ),
        "sessions of 4 to 12 turns with tools of 1 s between them",
    ),
    "shared-prefix": (
        Synthetic(jobs=2000, prompt="lognormal/100/0.5/400", output="lognormal/64/0.5/256", prefix=1500, groups=200),
        "200 groups of prompts that begin with the same 1,500 tokens, shuffled",
    ),
    "burstgpt-generated": (
        Synthetic(prompt="zipf/1.1/4096", output="zipf/1.1/2048", failures=0.02, cv=2**0.5),
        "BurstGPT's generator: Gamma gaps (shape 0.5), Zipf(1.1) lengths, failures",
    ),
}


def specified(preset: str, changes: Mapping[str, str]) -> Synthetic:
    """A preset with changes as texts.

    Raises:
        ValueError: an unknown key or a value that cannot be read.
    """
    base = PRESETS[preset][0]
    kinds = {f.name: type(getattr(base, f.name)) for f in fields(Synthetic)}
    made: dict[str, object] = {}
    for key, text in changes.items():
        if key not in kinds:
            raise ValueError(f"a synthetic trace has no {key!r} (use {', '.join(kinds)})")
        try:
            made[key] = kinds[key](text)
        except ValueError:
            raise ValueError(f"{key}={text} is not a number") from None
    return replace(base, **made)  # type: ignore[arg-type]


def generate(spec: Synthetic) -> Iterator[Job]:
    """
    Raises:
        ValueError: a length that cannot be read.
    """
    draw = random.Random(spec.seed)
    prompt, output, turns = lengths(spec.prompt), lengths(spec.output), lengths(spec.turns)
    gaps = poisson if spec.cv == 1 else gamma(spec.cv)
    labels = count(spec.groups + 1)
    now = 0.0
    for _ in range(spec.jobs):
        head = spec.prefix
        group = draw.randrange(spec.groups) + 1
        prompts, outputs, thinks, shared = [], [], [], []
        for turn in range(turns(draw)):
            prompts.append(head + prompt(draw))
            outputs.append(output(draw))
            thinks.append(draw.expovariate(1 / spec.think_s) if turn and spec.think_s > 0 else 0.0)
            shared.append(head if turn else 0)
            head = prompts[-1] + outputs[-1]
        made = session_spans(prompts, shared, labels) if spec.prefix or len(prompts) > 1 else [()] * len(prompts)
        spans = [_after_prefix(of_turn, spec.prefix, group) for of_turn in made]
        yield Job(
            arrival=now,
            turns=tuple(
                Turn(p, o, s, t, "tool" if t else "")
                for p, o, s, t in zip(prompts, outputs, spans, thinks, strict=True)
            ),
            tenant=f"tenant {draw.randrange(spec.tenants)}" if spec.tenants > 1 else "",
            patience_s=draw.uniform(0.1, 5.0) if draw.random() < spec.failures else float("inf"),
        )
        now += gaps(draw)


def _after_prefix(spans: tuple[Span, ...], prefix: int, group: int) -> tuple[Span, ...]:
    return ((prefix, group), *(span for span in spans if span[0] > prefix)) if prefix and spans else spans


def lengths(text: str) -> Draw:
    """A length distribution.

    Raises:
        ValueError: it cannot be read.
    """
    kind, *numbers = text.split("/")
    try:
        if not numbers:
            fixed = int(kind)
            return lambda draw: fixed
        values = [float(number) for number in numbers]
        if kind == "uniform":
            low, high = (int(value) for value in values)
            return lambda draw: draw.randint(low, high)
        if kind == "lognormal":
            middle, sigma, cap = values
            return lambda draw: max(1, min(int(cap), round(middle * draw.lognormvariate(0.0, sigma))))
        if kind == "zipf":
            exponent, most = values
            return lambda draw: _zipf(draw, exponent, int(most))
    except ValueError:
        pass
    raise ValueError(f"{text!r} is not a length: N, uniform/LOW/HIGH, lognormal/MEDIAN/SIGMA/CAP or zipf/EXPONENT/CAP")


def _zipf(draw: random.Random, exponent: float, cap: int) -> int:
    below = _zipf_shares(exponent, cap)
    return bisect_right(below, draw.random() * below[-1]) + 1


@lru_cache(maxsize=8)
def _zipf_shares(exponent: float, cap: int) -> list[float]:
    return list(accumulate(rank**-exponent for rank in range(1, cap + 1)))
