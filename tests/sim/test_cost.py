"""Plans are priced by the buckets that the runner takes."""

from __future__ import annotations

import dataclasses
import io
from functools import partial

import pytest
from msgspec import structs

from jaxserve.engine.shapes import EngineShape
from jaxserve.scheduler import make_policy
from jaxserve.sim.cost import HALF_WARM, WARM, Fitted, Published, features, terms_of
from jaxserve.sim.machine import Machine
from jaxserve.sim.profile import timed_steps
from jaxserve.sim.simulation import Simulation
from jaxserve.types import Plan, Work
from tests.sim.machines import jobs, machine

SHAPE = EngineShape(slots=16, max_len=1024, q=1, decode=(1, 4, 16), tiles=(1, 2, 4))


def rows(*starts: int) -> tuple[Work, ...]:
    return tuple(Work(i, i, start, 1, True) for i, start in enumerate(starts))


def test_features_of_a_mixed_step():
    tiles = (Work(9, 9, 64, 64, False), Work(9, 9, 128, 64, False), Work(8, 8, 0, 10, True))
    step = features(Plan(step=0, decode=rows(99, 49), prefill=tiles), SHAPE)
    assert step.bucket == (4, 4)  # mixed steps come in two widths; three tiles pad to four
    assert step.head == 4
    assert (step.context, step.longest) == (150, 100)
    assert (step.tile_context, step.tile_longest) == (128 + 192 + 10, 192)
    assert step.tile_pairs == (192**2 - 64**2) + 100


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (2, 4), (5, 16)])
def test_decode_steps_pad_to_their_width(count: int, bucket: int):
    step = features(Plan(step=0, decode=rows(*[10] * count)), SHAPE)
    assert step.bucket == (bucket, 0)


def test_the_published_fit():
    cost = Published()
    one_prompt = features(Plan(step=0, prefill=(Work(0, 0, 0, 64, True),)), SHAPE)
    assert cost.step_s(one_prompt) == pytest.approx((18.1 + 0.102 * 64 + 7.1e-6 * 64**2) / 1e3)
    decode = features(Plan(step=0, decode=rows(*[499] * 16)), SHAPE)
    assert cost.step_s(decode) == pytest.approx((19.9 + 0.0385 * 16 + 6.3e-4 * 16 * 500) / 1e3)


def test_a_prompt_costs_the_same_attention_whole_and_in_chunks():
    whole = sum((2 * start + 64) * 64 for start in (0, 64, 128))
    assert whole == 192**2


def test_what_a_profile_does_not_know_is_refused():
    step = features(Plan(step=0, decode=rows(10), prefill=(Work(1, 1, 0, 64, True),)), SHAPE)
    known = {name: 0.5 for name, _ in terms_of(step)}
    assert Fitted(terms=known).step_s(step) > 0.5
    known.pop("head[4]")
    with pytest.raises(ValueError, match=r"head\[4\].*profile the engine"):
        Fitted(terms=known).step_s(step)


def priced(**known: float) -> Machine:
    """Every step takes 10 ms and what `known` says of it."""
    terms = {f"forward[{rows},{tiles}]": 0.01 for rows in (1, 2, 4) for tiles in (0, 1, 2, 4)}
    terms |= {f"head[{rows}]": 0.0 for rows in (1, 4, 5, 8)} | {f"walk[{rows}]": 0.0 for rows in (1, 2, 4)}
    others = ("admit", "context", "tile context", "tile pairs", "tile tokens", "rows", "tile walk")
    terms |= dict.fromkeys(others, 0.0) | {f"after tiles[{rows}]": 0.0 for rows in (1, 2, 4)} | {"alone": 0.0}
    return dataclasses.replace(machine(), cost=Fitted(terms=terms | known))


def test_a_step_after_tiles_finds_nothing_in_the_caches():
    """The simulator prices it as the profile does: by the step that was launched before."""
    cold = priced(**{"after tiles[1]": 0.008})
    run = Simulation(jobs((0.0, 64, 6 + WARM)), cold, partial(make_policy, "sarathi")).run()
    assert run.served[0].first == pytest.approx(0.01)
    expected = [0.01 + 0.008 / 2 ** (step / HALF_WARM) for step in range(WARM)]
    assert run.gaps.seconds == pytest.approx([*expected, *[0.01] * 5])


@pytest.mark.parametrize("lag", [0, 1])
def test_what_the_host_does_for_a_step_is_hidden_by_the_one_before(lag: int):
    """Only the first step after a pause is launched while none is in flight; without planning ahead, all are."""
    record = io.BytesIO()
    machine = priced(alone=0.002)
    machine = dataclasses.replace(machine, limits=structs.replace(machine.limits, lag=lag))
    trace = jobs((0.0, 64, 4), (1.0, 64, 3))
    Simulation(trace, machine, partial(make_policy, "sarathi"), records=[record]).run()
    steps = timed_steps(record.getvalue(), SHAPE, warm_up=0)
    alone = [1, 0, 0, 0, 1, 0, 0] if lag else [1] * 7
    assert [one.step.alone for one in steps] == alone
    assert [one.seconds for one in steps] == pytest.approx([0.01 + 0.002 * one for one in alone])
