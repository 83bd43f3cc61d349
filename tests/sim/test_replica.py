"""Virtual time is the engine's: what a step takes, what the planning lag costs, when tokens come, what is cached."""

from __future__ import annotations

import io
from functools import partial

import msgspec
import pytest

from jaxserve.scheduler import make_policy
from jaxserve.scheduler.record import EVENT, frames
from jaxserve.sim.machine import PUBLISHED_BYTES_PER_TOKEN
from jaxserve.sim.simulation import Simulated, Simulation
from jaxserve.sim.workload import OPEN_END, Job, Trace, Turn
from jaxserve.types import Arrive, Event, StepDone
from tests.sim.machines import jobs, machine


def simulate(trace: Trace, max_tokens: int | None = None, programs: bool = True, **shape) -> Simulated:
    sarathi = partial(make_policy, "sarathi")
    return Simulation(trace, machine(**shape), sarathi, max_tokens=max_tokens, programs=programs).run()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_request_alone_takes_one_step_per_token_and_one_for_its_prompt(lag: int):
    run = simulate(jobs((0.5, 100, 3)), lag=lag)
    [one] = run.served
    assert one.first == pytest.approx(0.51)
    assert one.finish == pytest.approx(0.53)
    assert (one.ttft, one.tpot, one.queueing) == (pytest.approx(0.01), pytest.approx(0.01), 0.0)
    assert run.gaps.seconds == pytest.approx([0.01, 0.01])
    assert run.steps == 3


def test_an_end_that_the_scheduler_cannot_foresee_costs_the_row_planned_meanwhile():
    foreseen, unforeseen = simulate(jobs((0, 100, 3))), simulate(jobs((0, 100, 3)), max_tokens=50)
    assert (foreseen.steps, unforeseen.steps) == (3, 4)
    assert foreseen.served[0].finish == unforeseen.served[0].finish


def test_an_arrival_waits_for_the_steps_that_were_planned_before_it():
    # At 0.005 the steps at 0 and 0.01 have been launched; the next plan is made when the first is done.
    run = simulate(jobs((0, 64, 50), (0.005, 64, 1)))
    late = run.served[1]
    assert late.started == pytest.approx(0.01)
    assert late.first == pytest.approx(0.03)


def test_padding_is_priced():
    # Three tiles run in the program for four; the fourth costs as much as the others.
    costs = {"prefill_ms": 0.0, "prefill_token_ms": 1.0, "decode_ms": 0.0}
    [one] = simulate(jobs((0, 3 * 64, 1)), tiles=4, **costs).served
    assert one.ttft == pytest.approx(4 * 64 / 1e3)


def test_memory_pressure_preempts_and_recomputes():
    run = simulate(jobs((0, 64, 300), (0, 64, 300)), kv_tokens=8 * 64)
    assert [one.output for one in run.served] == [300, 300]
    assert run.served[1].preemptions >= 1
    assert run.served[1].recomputed > 64
    assert run.served[0].preemptions == 0


def test_what_is_swapped_out_comes_back_instead_of_being_computed_again():
    pressure = jobs((0, 64, 300), (0, 64, 300))
    costs = {"prefill_token_ms": 1.0}  # dear enough that copying pays
    computed = simulate(pressure, kv_tokens=8 * 64, **costs)
    swapped = simulate(pressure, kv_tokens=8 * 64, host_kv_tokens=64 * 64, **costs)
    assert [one.output for one in swapped.served] == [300, 300]
    assert swapped.totals["swap_in_bytes"] > 0
    assert 0 < swapped.totals["swap_out_moves"] < swapped.totals["swap_out_bytes"] / (64 * PUBLISHED_BYTES_PER_TOKEN)
    assert sum(one.recomputed for one in swapped.served) < sum(one.recomputed for one in computed.served)
    assert swapped.served[1].finish < computed.served[1].finish


def test_equal_blocks_are_found_again_and_others_are_not():
    head = ((128, 1),)
    turns = [Turn(200, 2, (*head, (200, 7))), Turn(300, 2, (*head, (300, 8))), Turn(300, 2, ((300, 9),))]
    trace = Trace("blocks", tuple(Job(arrival=float(i), turns=(turn,)) for i, turn in enumerate(turns)))
    assert [one.cached for one in simulate(trace).served] == [0, 128, 0]
    copied = Trace("copies", (trace.jobs[0], Job(arrival=1.0, turns=(turns[0],), copy=1)))
    assert [one.cached for one in simulate(copied).served] == [0, 0]


@pytest.mark.parametrize(("programs", "cached"), [(True, 159), (False, 128)])
def test_a_session_goes_on_after_its_tool_and_finds_prompt_and_answer(programs: bool, cached: int):
    """159 tokens have KV: the answer's last would have got it in a further step. A program takes all of them over, the
    prefix cache knows two full pages."""
    spans = ((OPEN_END, 1),)
    turns = (Turn(100, 60, spans), Turn(200, 5, ((160, 1), (OPEN_END, 2)), think_s=0.5, tool="search"))
    first, second = simulate(Trace("session", (Job(arrival=0.0, turns=turns),)), programs=programs).served
    assert second.arrival == pytest.approx(first.finish + 0.5)
    assert second.cached == cached
    assert (first.last_turn, second.last_turn) == (False, True)


def test_an_impatient_client_frees_its_place():
    run = simulate(jobs((0, 64, 500), patience_s=0.1), max_num_seqs=1)
    [one] = run.served
    assert one.aborted and one.finish == pytest.approx(0.1, abs=0.011)
    assert 5 <= one.output <= 12


def test_what_can_never_fit_is_refused_and_counted():
    run = simulate(jobs((0, 5000, 5), (0, 64, 5)))
    assert run.refused == 1
    assert len(run.served) == 1


def test_clients_take_the_next_job_when_theirs_is_done():
    trace = jobs(*[(0.0, 64, 5)] * 6)
    run = Simulation(trace, machine(), lambda: make_policy("sarathi"), clients=2).run()
    starts = sorted(one.arrival for one in run.served)
    assert starts[:2] == [0.0, 0.0] and starts[2] > 0
    assert max(sum(o.arrival <= one.arrival < o.finish for o in run.served) for one in run.served) == 2


def test_an_answer_ends_where_the_model_ends():
    """As in the engine, and a prompt that leaves no room for an answer is refused."""
    run = simulate(jobs((0, 1000, 100), (0, 1024, 5)), kv_tokens=2048, max_num_seqs=2)
    assert [(one.prompt, one.output, one.done) for one in run.served] == [(1000, 24, True)]
    assert run.refused == 1


def test_every_full_page_has_a_name():
    """As in the engine, where a page stays cached when its call ends, whether anybody asks for it again or not. So who
    lost its place soon loses its pages: a page without a name would be free, and taken before those."""
    shared, own = ((64, 1),), ()
    turns = [Turn(130, 70, shared), Turn(130, 70, shared), Turn(70, 60, own)]
    trace = Trace("test", tuple(Job(arrival=float(i), turns=(turn,)) for i, turn in enumerate(turns)))
    record = io.BytesIO()
    Simulation(trace, machine(), partial(make_policy, "sarathi"), records=[record]).run()
    names: dict[int, list[bytes]] = {}
    events = msgspec.msgpack.Decoder(Event)
    for event in (events.decode(body) for kind, body in frames(record.getvalue()) if kind == EVENT):
        if isinstance(event, Arrive):
            names[event.seq] = list(event.hashes)
        elif isinstance(event, StepDone):
            for result in event.results:
                names[result.seq] += result.hashes
    first, second, third = names.values()
    assert [len(each) for each in names.values()] == [199 // 64, 199 // 64, 129 // 64]
    assert first[0] == second[0]
    assert len({*first, *second, *third}) == 3 + 2 + 2
