"""Multi-level feedback queues: short jobs first without knowing which are short."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Set
from itertools import islice

from jaxserve.scheduler.costs import prefill_s
from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Evict, Policy
from jaxserve.scheduler.queue import Queue
from jaxserve.scheduler.view import SeqView, View
from jaxserve.types import PAGE_TOKENS, Abort, Arrive, Event, Plan, SeqId, StepDone

AHEAD = 4
"""Displaced jobs whose pages are fetched before it is their turn."""


class Job:
    """`used`: seconds of service at this level; `ran`: when it last computed something; `tokens`: what it holds, or
    would hold if nothing had been taken from it, since it was first admitted."""

    __slots__ = ("level", "ran", "tokens", "used")

    def __init__(self, level: int, now: float) -> None:
        self.level = level
        self.tokens = 0
        self.used = 0.0
        self.ran = now


@register("mlfq")
class SkipJoinMLFQ(Policy):
    """Skip-join multi-level feedback queues (FastServe, arXiv:2305.05920).

    Level i has a quantum of `first_quantum_s * ratio**i`. A request joins the first level whose quantum covers its
    prompt alone, so it need not sink through levels that it would only pass. It is charged the duration of each step
    that it takes part in, and sinks a level when its quantum is used up. A better level displaces a worse one, never
    its own; who was displaced goes to the front of its level, who arrives or sinks to the back. Every `check_every`
    steps those that have not computed for `starve_s` seconds are lifted to the top: checking at every step would swap
    all the time.
    """

    displaces = True

    def __init__(
        self,
        levels: int = 10,
        first_quantum_s: float = 0.01,
        ratio: float = 2.0,
        starve_s: float = 3.0,
        check_every: int = 1000,
        full: float = 0.9,
    ) -> None:
        self.levels = levels
        self.first_quantum_s = first_quantum_s
        self.ratio = ratio
        self.starve_s = starve_s
        self.check_every = check_every
        self.full = full
        self._tokens = 0
        """Of all jobs that have been started and have not ended."""
        self._quanta = [first_quantum_s * ratio**level for level in range(levels)]
        self._jobs: dict[SeqId, Job] = {}
        self._queues = [Queue() for _ in range(levels)]
        """Displaced jobs by level."""
        self._new = [Queue() for _ in range(levels)]
        self._steps: deque[tuple[int, list[SeqId]]] = deque()
        """Who takes part in the steps whose end has not been reported."""
        self._residents: list[list[SeqView]] = []
        """Those of the plan that is being made, by level and arrival."""
        self._stamp = 0
        self._until_check = check_every

    def level(self, seq: SeqId) -> int:
        return self._jobs[seq].level

    # Events

    def on_event(self, event: Event, view: View) -> None:
        if isinstance(event, StepDone):
            self._charge(event, view)
            for result in event.results:
                job = self._jobs.get(result.seq)
                if job is not None:
                    job.tokens += result.tokens
                    self._tokens += result.tokens
                if result.finished:
                    self._forget(result.seq)
        elif isinstance(event, Arrive):
            seq = view.get(event.seq)
            if seq is not None:
                need = prefill_s(view, seq.prompt)
                last = self.levels - 1
                level = next((i for i, quantum in enumerate(self._quanta) if need <= quantum), last)
                self._jobs[seq.id] = Job(level, view.now)
                self._wait(seq, front=False)
        elif isinstance(event, Abort):
            self._forget(event.seq)

    def on_plan(self, plan: Plan, view: View) -> None:
        for admit in plan.admits:
            seq, job = view.get(admit.seq), self._jobs[admit.seq]
            if not job.tokens and seq is not None:
                job.tokens = seq.known
                self._tokens += seq.known
                self._new[job.level].discard(admit.seq)
            self._queues[job.level].discard(admit.seq)
        for preempted in plan.preempted:
            seq = view.get(preempted)
            if seq is not None:
                self._wait(seq, front=True)
        if plan.has_work:
            tiles = dict.fromkeys(work.seq for work in plan.prefill)
            self._steps.append((plan.step, [work.seq for work in plan.decode] + list(tiles)))

    def _charge(self, done: StepDone, view: View) -> None:
        step, took_part = self._steps.popleft()
        while step != done.step:  # steps that this policy did not see planned
            step, took_part = self._steps.popleft()
        for seq in took_part:
            job = self._jobs.get(seq)
            if job is None:
                continue
            job.ran = done.now
            job.used += done.duration
            if job.used > self._quanta[job.level] and job.level < self.levels - 1:
                self._move(seq, job, job.level + 1, view)
        self._until_check -= 1
        if not self._until_check:
            self._until_check = self.check_every
            self._lift_the_starved(view)

    def _lift_the_starved(self, view: View) -> None:
        starved = [seq for queue in self._queues[1:] + self._new[1:] for seq in queue]
        for seq in starved:
            job = self._jobs[seq.id]
            if view.now - job.ran >= self.starve_s:
                self._move(seq.id, job, 0, view)

    def _move(self, seq: SeqId, job: Job, level: int, view: View) -> None:
        queue = self._queue(job)
        waiting = seq in queue
        queue.discard(seq)
        job.level, job.used = level, 0.0
        known = view.get(seq)
        if waiting and known is not None:
            self._wait(known, front=False)

    def _wait(self, seq: SeqView, front: bool) -> None:
        self._stamp += 1
        self._queue(self._jobs[seq.id]).add(seq, -self._stamp if front else self._stamp)

    def _queue(self, job: Job) -> Queue:
        return (self._queues if job.tokens else self._new)[job.level]

    def _forget(self, seq: SeqId) -> None:
        job = self._jobs.pop(seq, None)
        if job is not None:
            self._queue(job).discard(seq)
            self._tokens -= job.tokens

    # Answers

    def rank(self, view: View) -> Iterator[SeqView]:
        jobs = self._jobs
        residents = self._residents = [[] for _ in range(self.levels)]
        for seq in view.residents():
            residents[jobs[seq.id].level].append(seq)
        room = self._room(view)
        for level in range(self.levels):
            yield from residents[level]
            for seq in self._queues[level]:
                if not view.admitting:
                    break
                if seq.ready:
                    yield seq
            for seq in self._new[level]:
                if not view.admitting or seq.known > room:
                    break
                if seq.ready:
                    yield seq
                    room -= seq.known if seq.resident else 0

    def _room(self, view: View) -> float:
        """Tokens of new jobs that may be started; any, when nothing else is there."""
        host = iter(view.limits.host_pages)
        pools = [[kind.pages + next(host, 0) for kind in group.classes] for group in view.groups]
        least = min((max(pages) for pages, g in zip(pools, view.groups, strict=True) if g.window is None), default=0)
        if not least or not self._tokens:
            return float("inf")
        return self.full * least * PAGE_TOKENS - self._tokens

    def may_preempt(self, want: SeqView, victim: SeqView, view: View) -> Evict | None:
        mine, other = self._jobs[want.id].level, self._jobs[victim.id].level
        later = want.resident and mine == other and victim.order > want.order
        return Evict.SWAP if other > mine or later else None

    def victims(self, view: View) -> Iterator[SeqView]:
        for level in reversed(self._residents):
            yield from reversed(level)

    def residency(self, view: View, planned: Set[SeqId]) -> Iterator[SeqView]:
        """Who will be next (FastServe's proactive upload)."""
        return islice((seq for queue in self._queues for seq in queue if seq.preemptions), AHEAD)
