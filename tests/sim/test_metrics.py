"""Figures from served requests, worked out by hand."""

from __future__ import annotations

import math

import pytest

from jaxserve.sim.metrics import SLO, Gaps, Run, Served, figures, interval, job_times, shares, spread


def served(
    job: int = 0, arrival: float = 0.0, first: float = 1.0, finish: float = 3.0, output: int = 5, **more
) -> Served:
    return Served(
        job=job,
        turn=0,
        arrival=arrival,
        prompt=10,
        output=output,
        started=arrival + 0.5,
        first=first,
        finish=finish,
        **more,
    )


def test_a_request():
    one = served()
    assert (one.ttft, one.tpot, one.latency, one.queueing) == (1.0, 0.5, 3.0, 0.5)
    assert math.isnan(served(output=1).tpot)


def test_figures():
    run = Run([served(0), served(1, arrival=1.0, first=1.5, finish=5.0, output=8), served(2, aborted=True)], refused=1)
    made = figures(run, SLO(ttft=0.6, tpot=1.0))
    assert made["requests"] == 4 and made["finished"] == 2 and made["aborted"] == 1
    assert made["seconds"] == 5.0
    assert made["new_tokens_per_s"] == 13 / 5
    assert made["latency_mean_s"] == 3.5
    assert made["ttft_p50_s"] == 1.0
    assert made["norm_mean_s_per_token"] == (3 / 5 + 4 / 8) / 2
    assert made["slo_attainment"] == 1 / 3
    assert made["goodput_per_s"] == 1 / 5


def test_a_single_token_has_no_time_per_token_to_miss():
    assert SLO(ttft=1.0, tpot=0.1).met(served(output=1))


def test_job_times_count_all_turns_and_tools():
    first, second = served(7, last_turn=False), served(7, arrival=5.0, first=6.0, finish=8.0)
    assert job_times([first, second]) == [8.0]
    assert job_times([first]) == []


def test_gaps_weigh_by_count():
    gaps = Gaps()
    gaps.add(0.1, 98)
    gaps.extend([0.5, 2.0])
    made = gaps.figures()
    assert made["tbt_p50_s"] == 0.1
    assert made["tbt_p99_s"] == 0.5
    assert made["tbt_max_s"] == 2.0
    assert made["tbt_mean_s"] == pytest.approx((9.8 + 2.5) / 100)


def test_spread_ignores_what_did_not_happen():
    assert spread("x", [math.nan]) == {}
    assert spread("x", [1.0, math.nan, 3.0])["x_mean_s"] == 2.0


def test_intervals_cover_the_mean_and_shrink():
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert low < mean == 2.5 < high
    _, low4, high4 = interval([1.0, 2.0, 3.0, 4.0] * 4)
    assert high4 - low4 < high - low
    assert math.isnan(interval([1.0])[1])


def test_shares_are_of_the_time_in_which_all_send():
    def of(tenant: str, arrival: float, finish: float, output: int) -> Served:
        return served(arrival=arrival, finish=finish, output=output, tenant=tenant)

    run = [of("a", 0, 2, 5), of("b", 1, 3, 15), of("a", 4, 6, 50), of("b", 9, 12, 5), served(tenant="b", aborted=True)]
    assert shares(run) == {"a": 20 / 60, "b": 40 / 60}, "what ends after a has stopped sending does not count"
    assert shares([of("a", 0, 2, 5)]) == {"a": 0}, "it ended after the last arrival"
