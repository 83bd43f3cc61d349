"""Plays a trace into an engine core on this thread, and measures what comes out as the simulator does.

No client, no other thread: what is timed is the engine's loop. `jaxserve profile` and the benchmarks use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

from jaxserve.engine.inbox import Inbox, Message
from jaxserve.sim.metrics import Run, Served
from jaxserve.sim.tokens import prompt_tokens
from jaxserve.sim.workload import Job, common_tokens
from jaxserve.types import Deltas, FromCore, Request, SamplingParams, Submit


class Clock(Protocol):
    """Time in seconds, and how to let it pass."""

    def __call__(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...
    def forget(self, seconds: float) -> None:
        """That long has just passed and does not count."""
        ...


class WallClock:
    """Everybody's time."""

    def __init__(self) -> None:
        self._forgotten = 0.0

    def __call__(self) -> float:
        return time.monotonic() - self._forgotten

    def forget(self, seconds: float) -> None:
        self._forgotten += seconds

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class WorkClock:
    """Processor time of this process, all threads together; sleeping just adds to it. What an engine on a CPU does then
    takes about the same time whatever else the machine does."""

    def __init__(self) -> None:
        self._slept = 0.0

    def __call__(self) -> float:
        return time.process_time() + self._slept

    def sleep(self, seconds: float) -> None:
        self._slept += seconds

    def forget(self, seconds: float) -> None:
        self._slept -= seconds


CLOCKS: dict[str, Callable[[], Clock]] = {"wall": WallClock, "work": WorkClock}


class Steps(Protocol):
    def step(self) -> bool: ...


class TracePlayer(Inbox):
    """The inbox and the sink of a core: requests come at their times, the next turn of a session when its tool has run.

    Greedy, exactly as many tokens as the trace says. Times are seconds from the first `drain` after `load` on.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self.clock = clock or WallClock()
        self.load(())

    def load(self, jobs: Sequence[Job]) -> None:
        """What to play next. Prompts are made now: drawing their tokens takes longer than a step."""
        self.run = Run([])
        self._jobs = jobs
        self._start: float | None = None
        self._due: list[tuple[float, int, int, int]] = []
        self._entered = count()
        self._open: dict[str, tuple[Served, int, float]] = {}
        self._last: dict[str, float] = {}
        self._prompts = {
            (number, index): prompt_tokens(job, index, number)
            for number, job in enumerate(jobs)
            for index in range(len(job.turns))
        }
        self._known: dict[int, list[int]] = {}
        for number, job in enumerate(jobs):
            self._enter(job.arrival, number, 0)

    def play(self, core: Steps, jobs: Sequence[Job]) -> Run:
        """Steps `core`, whose inbox and sink this is, until all jobs are done."""
        self.load(jobs)
        while self._due or self._open:
            if not core.step():
                self.wait(0.01)
        return self.run

    def _request(self, number: int, index: int) -> Request:
        """The turn as it is sent: what it shares with the one before is what that really said."""
        job, prompt = self._jobs[number], self._prompts[number, index]
        turn, session = job.turns[index], len(job.turns) > 1
        last = index == len(job.turns) - 1
        if index:
            known = self._known[number]
            common = common_tokens(job.turns[index - 1].spans, turn.spans, min(len(known), len(prompt)))
            prompt = known[:common] + prompt[common:]
        if session:
            self._known[number] = list(prompt)
        return Request(
            id=f"{number}/{index}",
            prompt=prompt,
            params=SamplingParams(max_tokens=turn.output, temperature=0.0, seed=0, ignore_eos=True),
            priority=job.priority,
            tenant=job.tenant,
            program_id=str(number) if session else "",
            last_turn=last,
            tool="" if last else job.turns[index + 1].tool,
        )

    def _enter(self, at: float, number: int, index: int) -> None:
        heappush(self._due, (at, next(self._entered), number, index))

    @property
    def now(self) -> float:
        if self._start is None:
            self._start = self.clock()
        return self.clock() - self._start

    # The core's inbox

    def drain(self) -> list[Message]:
        messages, now = super().drain(), self.now
        while self._due and self._due[0][0] <= now:
            at, _, number, index = heappop(self._due)
            request = self._request(number, index)
            turns = self._jobs[number].turns
            served = Served(
                job=number,
                turn=index,
                arrival=at,
                prompt=len(request.prompt),
                tenant=request.tenant,
                last_turn=index == len(turns) - 1,
            )
            self.run.served.append(served)
            self._open[request.id] = served, number, now
            messages.append(Submit(request=request))
        return messages

    def wait(self, timeout: float | None) -> None:
        until = self._due[0][0] - self.now if self._due else timeout
        if until is not None and until > 0:
            self.clock.sleep(min(until, 1.0))

    # What the core says

    def emit(self, message: FromCore) -> None:
        """Takes what the core says."""
        if not isinstance(message, Deltas):
            return
        now = self.now
        for delta in message.deltas:
            served, number, taken = self._open[delta.id]
            if delta.error is not None:
                raise ValueError(f"request {delta.id}: {delta.error}")
            before = self._last.get(delta.id)
            if before is None:
                served.first, served.started = now, taken + delta.queued_s
                served.cached = delta.cached_tokens
            else:
                self.run.gaps.add(now - before)
            self._last[delta.id] = now
            served.output += len(delta.tokens)
            if not served.last_turn:
                self._known[number] += delta.tokens
            if delta.finish is not None:
                served.finish = now
                del self._open[delta.id], self._last[delta.id]
                if not served.last_turn:
                    turn = self._jobs[number].turns[served.turn + 1]
                    self._enter(now + turn.think_s, number, served.turn + 1)
