"""Engines in this process that play traces, and what the simulator says of the same arrivals. Shared by scripts."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.cli.player import CLOCKS, TracePlayer
from jaxserve.config import EngineConfig
from jaxserve.engine.load import load_core
from jaxserve.engine.shapes import EngineShape
from jaxserve.sim import traces
from jaxserve.sim.machine import Machine
from jaxserve.sim.metrics import figures
from jaxserve.sim.profile import timed_steps
from jaxserve.sim.simulation import Simulation
from jaxserve.sim.sweep import PolicySpec
from jaxserve.sim.workload import Trace, poisson, sample
from jaxserve.types import Control


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
        self._seen = 0
        self.play(sample(traces.load("synthetic:jobs=6,prompt=200,output=8"), 6, 100.0, 0, poisson))

    def play(self, trace: Trace) -> dict[str, float]:
        """Figures of a trace, with `step_mean_s` and `steps`. The prefix cache is empty at its begin."""
        self._player.put(Control(verb="reset_prefix_cache"))
        run = self._player.play(self._core, trace.jobs)
        timed = timed_steps(self._record.read_bytes(), self._shape, warm_up=0)
        steps, self._seen = timed[self._seen :], len(timed)
        return {**figures(run), "step_mean_s": statistics.fmean(one.seconds for one in steps), "steps": len(steps)}

    def close(self) -> None:
        self._core.close()
        self._folder.cleanup()


def predict(machine: Machine, policy: PolicySpec, trace: Trace) -> dict[str, float]:
    """What the simulator says of the same arrivals."""
    options = policy.options
    run = Simulation(trace, machine.with_options(**options) if options else machine, policy.make).run()
    return {**figures(run), "step_mean_s": run.busy_s / run.steps, "steps": run.steps}


def percent(predicted: Mapping[str, float], measured: Mapping[str, float], name: str) -> str:
    return f"{100 * (predicted[name] / measured[name] - 1):+.0f}%"
