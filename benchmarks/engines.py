"""Engines in this process that play traces, and what the simulator says of the same arrivals. Shared by scripts."""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxserve.cli.metronome import Metronome, SmallEngine
from jaxserve.cli.player import CLOCKS, TracePlayer
from jaxserve.cli.profile import measure
from jaxserve.config import EngineConfig
from jaxserve.engine.load import load_core
from jaxserve.engine.shapes import EngineShape
from jaxserve.sim import traces
from jaxserve.sim.cost import Fitted
from jaxserve.sim.machine import Machine
from jaxserve.sim.metrics import Run, figures, shares
from jaxserve.sim.profile import Profile, Timed, read_profile, timed_steps, write_profile
from jaxserve.sim.simulation import Simulation
from jaxserve.sim.sweep import PolicySpec
from jaxserve.sim.workload import Trace, poisson, sample
from jaxserve.types import Control

WARM_UP = "synthetic:jobs=40,prompt=uniform/50/400,output=uniform/20/80"
"""Some hundred steps of all kinds: until then a policy that plans by time believes in the speed of an A100."""
SMALL = "synthetic:jobs=40,prompt=uniform/10/200,output=uniform/2/6"
"""One after another, so that the programs for few rows and tiles have run: the first time takes tens of ms more."""


@dataclass(frozen=True)
class Played:
    """`figures`: those of sim/metrics.py, with `step_mean_s`, `steps` and `makespan_s`, and where there are several
    tenants `share_NAME` and `latency_mean_NAME_s` of each. `jobs`: completion times, by order of arrival; `timed`: the
    engine's steps; `beat_s`: what a beat of the metronome took meanwhile."""

    figures: dict[str, float]
    jobs: tuple[float, ...]
    timed: tuple[Timed, ...] = ()
    beat_s: float = 0.0

    @classmethod
    def of(cls, run: Run, step_mean_s: float, steps: int, timed: Sequence[Timed] = (), beat_s: float = 0.0) -> Played:
        begin = min(one.arrival for one in run.served)
        more = {
            "step_mean_s": step_mean_s,
            "steps": steps,
            "makespan_s": max(one.finish for one in run.served if one.done) - begin,
        }
        parts = shares(run.served)
        for tenant, part in parts.items() if len(parts) > 1 else ():
            mine = [one.latency for one in run.served if one.tenant == tenant and one.done]
            more |= {f"share_{tenant}": part, f"latency_mean_{tenant}_s": statistics.fmean(mine)}
        ends: dict[int, float] = {one.job: one.finish for one in run.served if one.last_turn and one.done}
        begins = {one.job: one.arrival for one in run.served if one.turn == 0}
        return cls(figures(run) | more, tuple(ends[job] - begins[job] for job in sorted(ends)), tuple(timed), beat_s)


class Engine:
    """An engine under one policy. `play` steps it on this thread: no client and no transport is timed."""

    def __init__(self, options: Mapping[str, Any], policy: PolicySpec, clock: str = "wall") -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._record = Path(self._folder.name) / "record"
        self._player = TracePlayer(CLOCKS[clock]())
        params = [f"{key}={value}" for key, value in policy.params.items()]
        config = EngineConfig.of(
            **options,
            **policy.options,
            scheduling_policy=policy.name,
            scheduling_params=params,
            record=str(self._record),
            wait_for_buckets=True,
        )
        self._core = load_core(config, self._player, self._player.emit, lambda _: None, self._player.clock)
        self._shape = EngineShape.of(config, self._core.ready.limits.max_model_len, on_gpu=False)
        self._small = SmallEngine(config)
        self._metronome = Metronome(self._core, self._player.clock, self._small)
        self._seen = 0
        self.play(sample(traces.load(WARM_UP), 40, 100.0, 0, poisson))
        self.play(sample(traces.load(SMALL), 40, 40.0, 0, poisson))
        gc.collect()
        gc.freeze()  # as the engine's own process does: looking at all modules again takes as long as many steps

    def play(self, trace: Trace) -> Played:
        """The prefix cache is empty at its begin, and the metronome goes all the time."""
        heard = len(self._metronome.beats)
        self._player.put(Control(verb="reset_prefix_cache"))
        run = self._player.play(self._metronome, trace.jobs)
        timed = timed_steps(self._record.read_bytes(), self._shape, warm_up=0)
        steps, self._seen = timed[self._seen :], len(timed)
        mean_s = statistics.fmean(one.seconds for one in steps)
        return Played.of(run, mean_s, len(steps), steps, self._metronome.beat_s(heard))

    def close(self) -> None:
        self._core.close()
        self._small.close()
        self._folder.cleanup()


def fitting(trace: Trace, machine: Machine) -> Trace:
    """Without jobs that are longer than the model: the engine refuses them."""
    longest = machine.limits.max_model_len
    jobs = tuple(job for job in trace.jobs if all(turn.prompt + turn.output <= longest for turn in job.turns))
    return replace(trace, jobs=jobs)


def predict(machine: Machine, policy: PolicySpec, trace: Trace, pace: float = 1.0) -> Played:
    """What the simulator says of the same arrivals on a machine that is slower than its profile by `pace`."""
    options = policy.options
    if pace != 1 and isinstance(machine.cost, Fitted):
        terms = {name: pace * cost for name, cost in machine.cost.terms.items()}
        machine = replace(machine, cost=Fitted(terms=terms))
    run = Simulation(trace, machine.with_options(**options) if options else machine, policy.make).run()
    return Played.of(run, run.busy_s / run.steps, run.steps)


def profile_at(path: Path | None, options: Mapping[str, Any], rounds: int, clock: str) -> Profile:
    """The profile there; it is taken now, and written there, if there is none."""
    if path is not None and path.exists():
        return read_profile(path)
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    made = measure(EngineConfig.of(**options), rounds, say=say, clock=clock)
    if path is not None:
        write_profile(made, path)
    return made
