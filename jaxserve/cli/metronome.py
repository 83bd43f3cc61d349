"""How fast the machine is while it serves: the same work again and again between an engine's steps, timed.

Knows no trace and no cost. A machine that shares its hardware with others is a tenth or two faster or slower from one
second to the next; what is measured on it means something only beside a measure taken at the same time.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, Protocol

from jaxserve.cli.player import Clock
from jaxserve.config import EngineConfig
from jaxserve.engine.inbox import Inbox
from jaxserve.types import Request, SamplingParams, Submit

EVERY = 48
"""Steps between two beats: some tenth of the time goes to these."""
NEAR = 16
"""Beats from which the pace at a step is told: about a second. One alone is as noisy as a step."""
LONGEST = 3.0
"""Of a beat that took longer than so many usual ones, no more than that counts: it was interrupted."""
SMALL = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "kv_cache_memory": "8MiB",
    "enable_prefix_caching": False,
    "wait_for_buckets": True,
}
REQUESTS, PROMPT, OUTPUT = 2, 64, 8


class SmallEngine:
    """An engine of the bundled model, whatever is profiled. A call serves the same requests: as much time goes to their
    prompts as to their answers."""

    def __init__(self, config: EngineConfig) -> None:
        """`config`: of the engine that is profiled, for the device and the folder of compiled programs."""
        from jaxserve.engine.load import load_core

        runtime = config.runtime
        small = EngineConfig.of(device=runtime.device, compile_cache=runtime.compile_cache, **SMALL)
        self._inbox = Inbox()
        self._core = load_core(small, self._inbox, lambda _: None, lambda _: None)
        self._calls = 0
        self()

    def __call__(self) -> None:
        params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, seed=0, ignore_eos=True)
        for number in range(REQUESTS):
            prompt = [300 + (number + place) % 100 for place in range(PROMPT)]
            request = Request(id=f"{self._calls}/{number}", prompt=prompt, params=params, stream=False)
            self._inbox.put(Submit(request=request))
        self._calls += 1
        while self._core.step():
            pass

    def close(self) -> None:
        self._core.close()


class Core(Protocol):
    def step(self) -> bool: ...
    def settle(self) -> None: ...


class Beat(NamedTuple):
    step: int
    """The next step that was planned."""
    seconds: float


class Metronome:
    """Steps a core from its first step on. `clock`, the core's, stands still during a beat."""

    def __init__(self, core: Core, clock: Clock, work: Callable[[], None]) -> None:
        """`work`: what is done in a beat."""
        self.beats: list[Beat] = []
        self._core = core
        self._clock = clock
        self._work = work
        self._steps = 0

    def step(self) -> bool:
        if self._steps % EVERY == 0:
            self._beat()
        self._steps += 1
        return self._core.step()

    def _beat(self) -> None:
        self._core.settle()
        began = self._clock()
        self._work()
        seconds = self._clock() - began
        self._clock.forget(seconds)
        self.beats.append(Beat(self._steps, seconds))

    def beat_s(self, first: int = 0) -> float:
        """Mean seconds of a beat, from beat `first` on."""
        return _mean([beat.seconds for beat in self.beats[first:]])

    def pace(self, step: int) -> float:
        """By how much the machine was slower about that step than on average."""
        middle = bisect_left(self.beats, (step,))
        first = max(0, min(middle - NEAR // 2, len(self.beats) - NEAR))
        return _mean([beat.seconds for beat in self.beats[first : first + NEAR]]) / self.beat_s()


def _mean(seconds: list[float]) -> float:
    most = LONGEST * statistics.median(seconds)
    return statistics.fmean(min(one, most) for one in seconds)
