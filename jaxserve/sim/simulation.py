"""A trace through one or many replicas in virtual time. Knows nothing of files, tables and command lines."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

from msgspec import structs

from jaxserve.scheduler import Policy
from jaxserve.sim.clock import Agenda
from jaxserve.sim.dispatch import Dispatch, RoundRobin
from jaxserve.sim.machine import Machine
from jaxserve.sim.metrics import SLO, Gaps, Run, Served
from jaxserve.sim.replica import Call, Replica, Sample
from jaxserve.sim.workload import Job, Trace
from jaxserve.types import Arrive

COUNTERS = (
    "prefill_tokens",
    "prefill_padding_tokens",
    "decode_rows",
    "program_tokens_reused",
    "policy_errors",
    "swap_out_bytes",
    "swap_in_bytes",
    "swap_out_moves",
    "swap_in_moves",
)
"""Of each replica's scheduler; their sums are in a run's totals."""


class Stuck(RuntimeError):
    """A policy holds sequences back for ever."""


@dataclass
class Simulated(Run):
    """A run, what its replicas looked like meanwhile, and what it took."""

    steady: Gaps = field(default_factory=Gaps)
    """Times between tokens of consecutive steps: `gaps` without those in which a sequence had no place."""
    timelines: tuple[tuple[Sample, ...], ...] = ()
    steps: int = 0
    busy_s: float = 0.0
    """Time that devices computed, over all replicas."""


class Simulation:
    """Sends jobs to replicas and their next turns when tools have run. `max_tokens` is what clients allow a request to
    generate; None: exactly what it will generate, so that schedulers know its length. `clients`: instead of coming at
    their times, jobs are in a queue from which so many clients take the next one when theirs is done. `programs`:
    sessions say so. `slo`: what clients want; from it follow the deadlines that schedulers see."""

    def __init__(
        self,
        trace: Trace,
        machine: Machine,
        policy: Callable[[], Policy],
        replicas: int = 1,
        dispatch: Dispatch | None = None,
        max_tokens: int | None = None,
        clients: int | None = None,
        programs: bool = True,
        slo: SLO | None = None,
        records: Sequence[BinaryIO] = (),
        sample_every: float = math.inf,
    ) -> None:
        if replicas < 1:
            raise ValueError(f"{replicas} replicas cannot serve anything")
        self._trace = trace
        self._max_tokens = max_tokens
        self._dispatch = dispatch or RoundRobin()
        self._agenda = Agenda()
        self._longest = machine.limits.max_model_len
        self._replicas = [
            Replica(
                self._agenda,
                machine,
                policy(),
                self._finished,
                records[i] if i < len(records) else None,
                sample_every,
            )
            for i in range(replicas)
        ]
        self._served: list[Served] = []
        self._clients = clients
        self._programs = programs
        self._slo = slo
        self._queue = iter(enumerate(trace.jobs))
        self._left: dict[int, Job] = {}
        self._refused = 0

    def run(self) -> Simulated:
        """
        Raises:
            Stuck: requests are left, but no policy plans them and nothing is under way.
            IntegrityError: pages or slots do not add up in the end.
        """
        if self._clients is None:
            for number, job in self._queue:
                self._left[number] = job
                self._agenda.at(job.arrival, partial(self._arrives, number, 0))
        else:
            for _ in range(self._clients):
                self._next_job()
        with _without_garbage_collector():
            self._agenda.run()
        waiting = [seq for replica in self._replicas for seq in replica.calls]
        if waiting:
            raise Stuck(f"{len(waiting)} requests wait and nothing runs: their policy never plans them ({waiting[:5]})")
        gaps, steady = Gaps(), Gaps()
        for replica in self._replicas:
            replica.scheduler.check_integrity()
            gaps.merge(replica.gaps)
            steady.merge(replica.steady)
        return Simulated(
            served=self._served,
            gaps=gaps,
            steady=steady,
            totals=self._totals(),
            refused=self._refused,
            timelines=tuple(tuple(replica.samples) for replica in self._replicas),
            steps=sum(replica.steps for replica in self._replicas),
            busy_s=sum(replica.busy_s for replica in self._replicas),
        )

    def _totals(self) -> dict[str, float]:
        totals: dict[str, float] = {"steps": sum(replica.steps for replica in self._replicas)}
        totals["swap_copies"] = sum(replica.copies for replica in self._replicas)
        for name in COUNTERS:
            totals[name] = sum(replica.scheduler.counters[name] for replica in self._replicas)
        return totals

    # What happens

    def _arrives(self, number: int, index: int, now: float) -> None:
        job = self._left[number]
        turn = job.turns[index]
        if turn.prompt + turn.output > self._longest:  # the engine ends it there
            turn = structs.replace(turn, output=self._longest - turn.prompt)
        last = index == len(job.turns) - 1
        served = Served(job=number, turn=index, arrival=now, prompt=turn.prompt, tenant=job.tenant, last_turn=last)
        seq = len(self._served) + self._refused
        arrive = Arrive(
            now=now,
            seq=seq,
            prompt=turn.prompt,
            max_new=self._allowed(turn.prompt, turn.output),
            priority=job.priority,
            tenant=job.tenant,
            program=str(number) if self._programs and len(job.turns) > 1 else "",
            last_turn=last,
            tool="" if last else job.turns[index + 1].tool,
            deadline=self._slo.deadline(now, turn.output) if self._slo is not None else None,
            output=turn.output,
        )
        call = Call(arrive, job, turn, served)
        replica = self._replicas[self._dispatch.choose(call, self._replicas)]
        if turn.output < 1 or replica.scheduler.can_ever_fit(arrive) is not None:
            self._refused += 1
            self._job_ends(number)
            return
        self._served.append(served)
        replica.submit(call)
        if job.patience_s < math.inf:
            self._agenda.at(now + job.patience_s, partial(_leaves, replica, seq))

    def _job_ends(self, number: int) -> None:
        del self._left[number]
        if self._clients is not None:
            self._next_job()

    def _next_job(self) -> None:
        number, job = next(self._queue, (-1, None))
        if job is not None:
            self._left[number] = job
            self._agenda.at(self._agenda.now, partial(self._arrives, number, 0))

    def _allowed(self, prompt: int, output: int) -> int:
        if self._max_tokens is None:
            return output
        return max(output, min(self._max_tokens, self._longest - prompt))

    def _finished(self, call: Call) -> None:
        served, number = call.served, call.served.job
        if served.aborted or served.last_turn:
            self._job_ends(number)
            return
        then = served.finish + call.job.turns[served.turn + 1].think_s
        self._agenda.at(then, partial(self._arrives, number, served.turn + 1))


def _leaves(replica: Replica, seq: int, now: float) -> None:
    replica.abort(seq)


@contextmanager
def _without_garbage_collector() -> Iterator[None]:
    """Plans are small and acyclic; collecting over 100,000 requests would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
