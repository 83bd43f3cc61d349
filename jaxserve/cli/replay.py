"""Replays a trace against an OpenAI-compatible server and measures it with the simulator's metrics. Imports no jax."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from jaxserve.cli.errors import Failure
from jaxserve.cli.load import Shot, shoot
from jaxserve.sim.metrics import Run, Served
from jaxserve.sim.tokens import prompt_tokens
from jaxserve.sim.workload import Job, Trace


@dataclass
class Replay:
    """One replay. Requests are sent at their times whatever the server does; the next turn of a session follows the
    answer and its tool. Answers have the trace's lengths. `fields`: more of the request body. `programs`: sessions say
    which program they are, in fields that jaxserve knows."""

    base: str
    headers: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    programs: bool = False
    run: Run = field(default_factory=lambda: Run([]))
    refusal: str = ""
    """What the server said to the first request that it refused."""

    async def play(self, trace: Trace) -> Run:
        """
        Raises:
            Failure: the server does not answer, or refuses every request.
        """
        begin = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for number, job in enumerate(trace.jobs):
                    group.create_task(self._job(job, number, begin))
        except* (OSError, asyncio.IncompleteReadError) as errors:
            raise Failure(f"{self.base} does not answer: {errors.exceptions[0]}") from None
        if not self.run.served:
            raise Failure(self.refusal)
        return self.run

    async def _job(self, job: Job, number: int, begin: float) -> None:
        due = begin + job.arrival
        for index, turn in enumerate(job.turns):
            prompt = prompt_tokens(job, index, number)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            fields = {"temperature": 0, "ignore_eos": True, **self.fields, "max_tokens": turn.output}
            last = index == len(job.turns) - 1
            if self.programs and len(job.turns) > 1:
                tool = "" if last else job.turns[index + 1].tool
                fields |= {"program_id": str(number), "last_turn": last, "tool": tool}
            served = Served(
                job=number,
                turn=index,
                arrival=due,
                prompt=turn.prompt,
                tenant=job.tenant,
                last_turn=last,
            )
            try:
                async with asyncio.timeout(job.patience_s if job.patience_s < float("inf") else None):
                    shot = await shoot(self.base, prompt, fields, self.headers)
            except TimeoutError:
                served.aborted, served.finish = True, time.perf_counter()
                self.run.served.append(served)
                return
            except Failure as failure:
                self.refusal = self.refusal or str(failure)
                self.run.refused += 1
                return
            self._take(served, shot)
            due = shot.last + (job.turns[index + 1].think_s if not served.last_turn else 0.0)

    def _take(self, served: Served, shot: Shot) -> None:
        served.first, served.finish = shot.first, shot.last
        served.output, served.cached = shot.new_tokens, shot.cached_tokens
        self.run.served.append(served)
        self.run.gaps.extend(b - a for a, b in zip(shot.pieces, shot.pieces[1:], strict=False))
