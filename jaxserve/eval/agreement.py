"""How close two implementations are on the same prompts: greedy tokens and next-token distributions. Knows no engine.

A `Reading` is what one of them says about one prompt; readings.py takes them from engines and from transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxserve.eval.report import grid
from jaxserve.types import TokenLogprobs

TINY = 1e-9
"""Probability below which the rest of a distribution is rounding."""


@dataclass(frozen=True)
class Reading:
    """prompt: one entry a prompt token, None for the first: the distribution that token was drawn from. tokens: the
    greedy continuation, with an entry each."""

    prompt: tuple[TokenLogprobs | None, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Agreement:
    """Of two sides on the same prompts; the reference comes first in every difference.

    match_length: greedy tokens before the first difference, mean over prompts, of `generated`. top1, topk: share of
    prompt positions with the same best token, and mean share of the best `k` that both have. kl: of the reference's
    distribution from the other's, nats, mean and largest, a lower bound (see `divergence`). logprob: largest difference
    in the log-prob of a prompt token. close: prompts for which check_logprobs_close holds.
    """

    prompts: int
    positions: int
    generated: int
    match_length: float
    k: int
    top1: float
    topk: float
    kl_mean: float
    kl_max: float
    logprob_max: float
    close: int


def agreement(reference: Sequence[Reading], other: Sequence[Reading], k: int) -> Agreement:
    """
    Raises:
        ValueError: the sides did not read the same prompts.
    """
    pairs = list(zip(reference, other, strict=True))
    positions = [
        (mine, its)
        for a, b in pairs
        for mine, its in zip(a.prompt, b.prompt, strict=True)
        if mine is not None and its is not None
    ]
    if not positions or any(mine.ids[0] != its.ids[0] for mine, its in positions):
        raise ValueError("the two sides must read the same prompts, of two tokens or more")
    kl = [divergence(mine, its) for mine, its in positions]
    return Agreement(
        prompts=len(pairs),
        positions=len(positions),
        generated=max(len(a.tokens) for a in reference),
        match_length=sum(match_length(a.tokens, b.tokens) for a, b in pairs) / len(pairs),
        k=k,
        top1=sum(mine.ids[1] == its.ids[1] for mine, its in positions) / len(positions),
        topk=sum(len({*mine.ids[1 : k + 1]} & {*its.ids[1 : k + 1]}) / k for mine, its in positions) / len(positions),
        kl_mean=math.fsum(kl) / len(kl),
        kl_max=max(kl),
        logprob_max=max(abs(mine.logprobs[0] - its.logprobs[0]) for mine, its in positions),
        close=sum(check_logprobs_close(a, b, k) is None for a, b in pairs),
    )


def match_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first difference."""
    for index, (mine, its) in enumerate(zip(a, b, strict=False)):
        if mine != its:
            return index
    return min(len(a), len(b))


def divergence(p: TokenLogprobs, q: TokenLogprobs) -> float:
    """KL(p || q) in nats over the tokens that both list, with all others as one: never more than the true divergence
    (grouping outcomes cannot raise it), and close to it where the listed tokens hold most of the mass."""
    theirs = dict(zip(q.ids, q.logprobs, strict=True))
    shared = {token: value for token, value in zip(p.ids, p.logprobs, strict=True) if token in theirs}
    total = math.fsum(math.exp(value) * (value - theirs[token]) for token, value in shared.items())
    rest_p = max(1.0 - math.fsum(math.exp(value) for value in shared.values()), 0.0)
    rest_q = max(1.0 - math.fsum(math.exp(theirs[token]) for token in shared), 0.0)
    if rest_p > TINY:
        total += rest_p * math.log(rest_p / max(rest_q, TINY))
    return max(total, 0.0)


def check_logprobs_close(a: Reading, b: Reading, k: int) -> str | None:
    """None where the continuations are equal, or each side's token at the first difference is among the other's best
    `k`: after that the two continue different texts. Otherwise what is wrong."""
    at = match_length(a.tokens, b.tokens)
    if at == min(len(a.tokens), len(b.tokens)):
        return None
    for name, token, entry in (("first", a.tokens[at], b.logprobs[at]), ("second", b.tokens[at], a.logprobs[at])):
        if token not in entry.ids[1 : k + 1]:
            return f"token {at}: the {name} side's {token} is not among the other's best {k}, {entry.ids[1 : k + 1]}"
    return None


def table(found: Agreement, reference: str) -> str:
    lines = [
        [f"against {reference}", ""],
        ["prompts, positions", f"{found.prompts}, {found.positions:,}"],
        ["equal greedy tokens, mean", f"{found.match_length:.1f} of {found.generated}"],
        ["check_logprobs_close", f"{found.close} of {found.prompts}"],
        ["same best token", f"{found.top1:.4f}"],
        [f"shared among best {found.k}", f"{found.topk:.4f}"],
        ["KL, mean and largest (nats)", f"{found.kl_mean:.2e}, {found.kl_max:.2e}"],
        ["log-prob difference, largest", f"{found.logprob_max:.2e}"],
    ]
    return grid(lines) + "\n"


def as_data(found: Agreement, reference: str) -> dict[str, Any]:
    return {"reference": reference, **asdict(found)}
