"""Sampling keeps what a trace is made of; page names agree exactly as far as prompts do."""

from __future__ import annotations

import random
from itertools import count
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.sim.workload import (
    OPEN_END,
    Job,
    Trace,
    Turn,
    common_tokens,
    gamma,
    page_names,
    poisson,
    sample,
    session_spans,
)


def line(n: int) -> Trace:
    return Trace("line", tuple(Job(arrival=float(i * i), turns=(Turn(i + 1, 1),)) for i in range(n)))


@given(jobs=st.integers(2, 50), rate=st.floats(0.1, 100), seed=st.integers(0, 5))
def test_a_sample_has_the_rate_asked_for_and_the_trace_in_order(jobs: int, rate: float, seed: int):
    trace = line(20)
    made = sample(trace, jobs, rate, seed)
    assert made.rate == pytest.approx(rate)
    lengths = [job.turns[0].prompt for job in made.jobs]
    assert [(a % 20) + 1 for a in lengths[:-1]] == lengths[1:]
    # Copies count how often the trace began anew.
    assert [job.copy for job in made.jobs] == [(lengths[0] - 1 + i) // 20 for i in range(jobs)]


def test_a_sample_keeps_the_rhythm():
    made = sample(line(20), 15, 1.0, 3)
    first = made.jobs[0].turns[0].prompt - 1
    if first + 15 <= 20:
        gaps = [b.arrival - a.arrival for a, b in zip(made.jobs, made.jobs[1:], strict=False)]
        assert gaps == sorted(gaps)


@pytest.mark.parametrize(("gaps", "cv"), [(poisson, 1.0), (gamma(2.0), 2.0), (gamma(0.5), 0.5)])
def test_drawn_gaps_have_their_coefficient_of_variation(gaps, cv: float):
    draw = random.Random(0)
    drawn = [gaps(draw) for _ in range(40_000)]
    assert mean(drawn) == pytest.approx(1.0, rel=0.05)
    assert pstdev(drawn) / mean(drawn) == pytest.approx(cv, rel=0.05)


def test_a_trace_without_times_says_so():
    trace = Trace("still", tuple(Job(arrival=0.0, turns=(Turn(1, 1),)) for _ in range(3)))
    with pytest.raises(ValueError, match="no arrival times"):
        sample(trace, 3, 1.0, 0)


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 300)), min_size=2, max_size=6))
def test_turns_share_page_names_exactly_as_far_as_they_share_tokens(each: list[tuple[int, int]]):
    lengths = [prompt for prompt, _ in each]
    shared = [0, *(min(common, lengths[i], lengths[i + 1]) for i, (_, common) in enumerate(each[1:]))]
    # The tokens themselves: a turn begins with `shared` tokens of the one before and goes on with its own.
    texts: list[list[tuple[int, int]]] = []
    for turn, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        head = texts[-1][:common] if texts else []
        texts.append(head + [(turn, position) for position in range(len(head), length)])
    spans = session_spans(lengths, shared, count(1))
    names = [page_names(Turn(length, 1, s), 0, 0, length // 64) for length, s in zip(lengths, spans, strict=True)]
    for turn in range(1, len(each)):
        assert common_tokens(spans[turn - 1], spans[turn], min(lengths[turn - 1], lengths[turn])) == shared[turn]
    for a in range(len(each)):
        assert len(names[a]) == lengths[a] // 64
        for b in range(a):
            for page in range(min(len(names[a]), len(names[b]))):
                same = texts[a][: (page + 1) * 64] == texts[b][: (page + 1) * 64]
                # Names may be apart where contents meet again by chance; they never agree where contents do not.
                assert (names[a][page] == names[b][page]) <= same
                if b == a - 1 and (page + 1) * 64 <= shared[a]:
                    assert names[a][page] == names[b][page]


def test_names_end_where_spans_end_and_differ_between_copies():
    turn = Turn(300, 1, ((128, 5), (256, 6)))
    assert len(page_names(turn, 0, 0, 5)) == 4
    assert page_names(turn, 0, 2, 4) == page_names(turn, 0, 0, 4)[2:]
    assert not set(page_names(turn, 0, 0, 4)) & set(page_names(turn, 1, 0, 4))
    assert len(page_names(Turn(64, 200, ((OPEN_END, 1),)), 0, 0, 4)) == 4


def test_shrinking_keeps_what_is_shared():
    trace = Trace("two", tuple(Job(arrival=0.0, turns=(Turn(512, 8, ((256, 1), (512, i))),)) for i in (2, 3)))
    half = trace.shrunk(0.5)
    assert [(t.prompt, t.output) for t in half.turns] == [(256, 4)] * 2
    first, second = (page_names(turn, 0, 0, 4) for turn in half.turns)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, True, False, False]
