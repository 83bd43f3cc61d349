"""Rates from steps: what is learned is what steps were made of."""

from __future__ import annotations

import random

import pytest

from jaxserve.engine.pace import TELL_EVERY, Pace
from jaxserve.types import PAGE_TOKENS, Plan, Work

TRUE = {"step_s": 0.004, "prefill_token_s": 4e-5, "decode_row_s": 2e-4, "context_token_s": 1e-7}


def steps(count: int, seed: int = 0):
    draw = random.Random(seed)
    for step in range(count):
        longest = draw.choice([50, 500, 5000])
        rows = [Work(i, i, draw.randrange(1, longest), 1, True) for i in range(draw.randrange(32))]
        tiles = [Work(99, 40, 64 * i, 64, False) for i in range(draw.randrange(9))]
        context = sum(work.start + 1 for work in rows)
        took = TRUE["step_s"] + TRUE["prefill_token_s"] * PAGE_TOKENS * len(tiles)
        took += TRUE["decode_row_s"] * len(rows) + TRUE["context_token_s"] * context
        yield Plan(step=step, decode=tuple(rows), prefill=tuple(tiles)), took * draw.uniform(0.9, 1.1)


def test_rates_are_those_that_made_the_durations():
    pace = Pace(PAGE_TOKENS)
    told = [rates for plan, took in steps(4 * TELL_EVERY) if (rates := pace.add(plan, took)) is not None]
    assert len(told) == 4
    for name in ("step_s", "prefill_token_s", "decode_row_s"):
        assert told[-1][name] == pytest.approx(TRUE[name], rel=0.15)
    assert told[-1]["context_token_s"] == pytest.approx(TRUE["context_token_s"], rel=0.5)


def test_a_step_that_waited_for_something_else_teaches_nothing():
    pace = Pace(PAGE_TOKENS)
    rates = None
    for number, (plan, took) in enumerate(steps(8 * TELL_EVERY)):
        rates = pace.add(plan, took + (5.0 if number > TELL_EVERY and number % 20 == 0 else 0.0)) or rates
    assert rates is not None and rates["step_s"] < 2 * TRUE["step_s"]


def test_rates_are_never_negative():
    pace = Pace(PAGE_TOKENS)
    for step in range(TELL_EVERY - 1):
        pace.add(Plan(step=step, decode=(Work(0, 0, 1000 - step, 1, True),)), 0.01 + step * 1e-5)
    rates = pace.add(Plan(step=200, decode=(Work(0, 0, 500, 1, True),)), 0.02)
    assert rates is not None and min(rates.values()) >= 0
