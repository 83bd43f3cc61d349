"""How fast the machine is while it serves: the same work again and again between an engine's steps, timed.

Knows no trace and no cost. A machine that shares its hardware with others is a tenth or two faster or slower from one
second to the next; what is measured on it means something only beside a measure taken at the same time.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from typing import NamedTuple, Protocol

from jaxserve.cli.player import Clock
from jaxserve.engine.shapes import EngineShape

EVERY = 32
"""Steps between two beats: a tenth of the time goes to them."""
DECODES = 3
"""Decode steps in a beat; with the smallest of prefill, about as much time for either."""
NEAR = 16
"""Beats from which the pace at a step is told: about a second. One alone is as noisy as a step."""
LONGEST = 3.0
"""Of a beat that took longer than so many usual ones, no more than that counts: it was interrupted."""


class Core(Protocol):
    def step(self) -> bool: ...
    def settle(self) -> None: ...
    def blank_step(self, rows: int, tiles: int) -> None: ...


class Beat(NamedTuple):
    step: int
    """The next step that was planned."""
    seconds: float


class Metronome:
    """Steps a core from its first step on. `clock`, the core's, stands still during a beat."""

    def __init__(self, core: Core, clock: Clock, shape: EngineShape) -> None:
        self.beats: list[Beat] = []
        self._core = core
        self._clock = clock
        self._decode = (shape.decode[-1], 0)
        self._mixed = (shape.mixed_decode[0], shape.tiles[0])
        self._steps = 0

    def step(self) -> bool:
        if self._steps % EVERY == 0:
            self._beat()
        self._steps += 1
        return self._core.step()

    def _beat(self) -> None:
        self._core.settle()
        began = self._clock()
        for _ in range(DECODES):
            self._core.blank_step(*self._decode)
        self._core.blank_step(*self._mixed)
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
