"""A machine that is now slow, now fast: what the metronome hears, and that prices are those of its mean pace."""

from __future__ import annotations

import io
from functools import partial

import pytest

from jaxserve.cli.metronome import EVERY, NEAR, Metronome
from jaxserve.scheduler import make_policy
from jaxserve.sim.profile import grouped, timed_steps
from jaxserve.sim.simulation import Simulation
from tests.sim.machines import jobs, machine

STEP_S, BEAT_S = 0.01, 0.004


class Clock:
    """Time that passes when somebody works, and how much of it counts."""

    def __init__(self) -> None:
        self.now = self.forgotten = 0.0

    def __call__(self) -> float:
        return self.now - self.forgotten

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def forget(self, seconds: float) -> None:
        self.forgotten += seconds


class Core:
    """Steps, and what is done in a beat, take their time, `slow(step)` times as long."""

    def __init__(self, clock: Clock, slow=lambda step: 1.0) -> None:
        self.clock, self.slow = clock, slow
        self.steps = 0
        self.under_way = 0.0

    def step(self) -> bool:
        self.settle()
        self.under_way = STEP_S * self.slow(self.steps)
        self.steps += 1
        return True

    def settle(self) -> None:
        self.clock.sleep(self.under_way)
        self.under_way = 0.0

    def work(self) -> None:
        assert not self.under_way, "a beat began before the step was done"
        self.clock.sleep(BEAT_S * self.slow(self.steps))


def beat_for(steps: int, slow=lambda step: 1.0) -> tuple[Metronome, Core, Clock]:
    clock = Clock()
    core = Core(clock, slow)
    metronome = Metronome(core, clock, core.work)
    for _ in range(steps):
        assert metronome.step()
    core.settle()
    return metronome, core, clock


def test_the_clock_stands_still_during_a_beat():
    metronome, _, clock = beat_for(10 * EVERY)
    assert clock() == pytest.approx(10 * EVERY * STEP_S)
    assert [beat.step for beat in metronome.beats] == list(range(0, 10 * EVERY, EVERY))
    assert metronome.beat_s() == pytest.approx(BEAT_S)


def test_pace_is_that_of_the_moment_and_of_a_run():
    half = 4 * NEAR * EVERY
    metronome, _, _ = beat_for(2 * half, slow=lambda step: 3.0 if step >= half else 1.0)
    assert metronome.beat_s() == pytest.approx(2 * BEAT_S)
    assert metronome.beat_s(4 * NEAR) == pytest.approx(3 * BEAT_S)
    assert [metronome.pace(step) for step in (0, half // 2)] == pytest.approx([0.5, 0.5])
    assert [metronome.pace(step) for step in (half + half // 2, 2 * half)] == pytest.approx([1.5, 1.5])


def test_an_interrupted_beat_says_little():
    metronome, _, _ = beat_for(NEAR * EVERY, slow=lambda step: 500.0 if step == 3 * EVERY else 1.0)
    assert metronome.beat_s() < 1.2 * BEAT_S


def test_a_profile_is_of_the_machine_at_its_mean_pace():
    """The second half of a run is recorded by a machine that is three times as slow."""
    run = partial(Simulation, jobs((0.0, 100, 200)), policy=partial(make_policy, "sarathi"))
    fast, slow = io.BytesIO(), io.BytesIO()
    run(machine=machine(), records=[fast]).run()
    run(machine=machine(prefill_ms=30.0, decode_ms=30.0), records=[slow]).run()
    shape = machine().shape
    steps = [
        *timed_steps(fast.getvalue(), shape, 0, lambda step: 0.5),
        *timed_steps(slow.getvalue(), shape, 0, lambda step: 1.5),
    ]
    assert steps and all(one.seconds == pytest.approx(0.02) for one in steps)


def test_steps_soon_after_tiles_are_of_their_own():
    record = io.BytesIO()
    Simulation(jobs((0.0, 100, 5)), machine(), partial(make_policy, "sarathi"), records=[record]).run()
    steps = timed_steps(record.getvalue(), machine().shape, 0)
    assert [one.step.since_tiles for one in steps] == [0, 1, 2, 3, 4]
    assert [group.step.since_tiles for group in grouped(steps)] == [0, 1, 2, 3, 4]
