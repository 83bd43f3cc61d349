"""Multi-level feedback queues: short jobs first without knowing which are short."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Set
from itertools import islice
from math import inf

from jaxserve.scheduler.costs import cost, decode_s, prefill_s
from jaxserve.scheduler.policies import register
from jaxserve.scheduler.policy import Evict, Policy
from jaxserve.scheduler.queue import Queue
from jaxserve.scheduler.view import SeqView, View
from jaxserve.types import Abort, Arrive, Event, Plan, SeqId, StepDone

NUDGE = 1.02
"""A step's time moves what is known of steps by this factor, up or down: the median of the last hundred or so, however
long one took that something else interrupted."""
STARVE_JOBS = 5.0
"""Who has not computed for so many times what a job takes is starved."""
RECENT_JOBS = 64
"""Jobs from which that is known."""
LIFT_SHARE = 0.01
"""Of the time, at most, goes to the tiles with which lifted jobs take their places again."""
AHEAD = 4
"""Displaced jobs whose pages are fetched before it is their turn."""
LOOKED_AT = 32
"""Waiting jobs that a step asks whether they are starved; a lift takes some ten microseconds."""


class Job:
    """`used`: seconds of service at this level; `ran`: when it last computed something; `started`: whether it has been
    admitted before."""

    __slots__ = ("level", "ran", "seq", "started", "used")

    def __init__(self, seq: SeqView, now: float) -> None:
        self.seq = seq
        self.level = 0
        self.started = False
        self.used = 0.0
        self.ran = now


@register("mlfq")
class SkipJoinMLFQ(Policy):
    """Skip-join multi-level feedback queues (FastServe, arXiv:2305.05920).

    Level i has a quantum of `first_quantum_s * ratio**i`, the first one by default what a step takes that only decodes.
    A request joins the first level whose quantum covers its prompt alone, so it need not sink through levels that it
    would only pass. It is charged the duration of each step that it takes part in, and sinks a level when its quantum
    is used up. A better level displaces a worse one, never its own, and at most `per_step` do so in a step, since a
    place that changes hands costs a tile and planning time; who was displaced goes to the front of its level, who
    arrives or sinks to the back.

    Every `check_every` steps those that have not computed for `starve_s` seconds, by default five times what a job
    takes from arrival to end, are lifted to the top, a few a step: checking at every step would swap all the time, and
    lifting all who wait at once would make everybody else wait for it. Where a tile costs as much as several decode
    steps (a small model on a CPU), lifting all who wait too long under overload would take much of the machine, so
    lifts are bounded as well by what their tiles take of its time; the next check goes on where this one stopped.

    Both defaults come from the durations of steps and the ends of jobs: an engine that is twice as fast does the same.
    """

    displaces = True

    def __init__(
        self,
        levels: int = 10,
        first_quantum_s: float | None = None,
        ratio: float = 2.0,
        starve_s: float | None = None,
        check_every: int = 1000,
        full: float = 0.9,
        per_step: int = 8,
    ) -> None:
        self.levels = levels
        self.first_quantum_s = first_quantum_s
        self.ratio = ratio
        self.starve_s = starve_s
        self.check_every = check_every
        self.full = full
        self.per_step = per_step
        self._tokens = 0
        """What all jobs that have been started and have not ended hold, or would if nothing had been taken from them.
        """
        self._growth = [*(ratio**level for level in range(levels - 1)), inf]
        """Quanta by level, in first ones."""
        self._decode_s = 0.0
        """What a step that only decodes usually takes here. 0: nobody knows yet."""
        self._job_s = inf
        """How long a job usually takes here, from its arrival to its end."""
        self._jobs: dict[SeqId, Job] = {}
        self._queues = [Queue() for _ in range(levels)]
        """Displaced jobs by level."""
        self._new = [Queue() for _ in range(levels)]
        self._steps: deque[tuple[int, bool, set[SeqId]]] = deque()
        """Of the steps whose end has not been reported: whether they only decode, and who takes part without a token to
        show for it."""
        self._residents: list[list[SeqView]] = []
        """Those of the plan that is being made, by level and arrival."""
        self._displaced = 0
        """By that plan, as far as `_has_place` has looked."""
        self._stamp = 0
        self._until_check = check_every
        self._unlooked: deque[SeqView] = deque()
        """Who waited below the top at the last check and has yet to be looked at."""
        self._checked = 0.0
        """When that was."""
        self._since = 0.0
        """Who has not computed since then was starved at that check."""
        self._lifts = 0.0
        """How many more may be lifted until the next check."""

    def level(self, seq: SeqId) -> int:
        return self._jobs[seq].level

    # Events

    def on_event(self, event: Event, view: View) -> None:
        if isinstance(event, StepDone):
            self._step_done(event, view)
        elif isinstance(event, Arrive):
            seq = view.get(event.seq)
            if seq is not None:
                need = prefill_s(view, seq.prompt)
                job = self._jobs[seq.id] = Job(seq, view.now)
                first = self._first_quantum(view)
                job.level = next(level for level, most in enumerate(self._growth) if need <= first * most)
                self._wait(job, front=False)
        elif isinstance(event, Abort):
            self._forget(event.seq)

    def on_plan(self, plan: Plan, view: View) -> None:
        for admit in plan.admits:
            job = self._jobs[admit.seq]
            self._queue(job).discard(admit.seq)
            if not job.started:
                job.started = True
                self._tokens += job.seq.known
        for preempted in plan.preempted:
            if preempted in self._jobs:
                self._wait(self._jobs[preempted], front=True)
        if plan.has_work:
            silent = {work.seq for work in plan.prefill if not work.samples}
            self._steps.append((plan.step, not plan.prefill, silent))

    def _step_done(self, done: StepDone, view: View) -> None:
        step, decodes, silent = self._steps.popleft()
        while step != done.step:  # steps that this policy did not see planned
            step, decodes, silent = self._steps.popleft()
        jobs, growth, now, duration, tokens = self._jobs, self._growth, done.now, done.duration, 0
        if decodes:
            known = self._step(view)
            self._decode_s = known * NUDGE if duration > known else known / NUDGE
        first = self._first_quantum(view)
        for result in done.results:
            job = jobs.get(result.seq)
            if job is None:
                continue
            tokens += result.tokens
            job.ran = now
            job.used += duration
            if job.used > first * growth[job.level]:
                self._sink(job)
        self._tokens += tokens
        for result in done.results:
            if result.finished:
                self._know_job(result.seq, now)
                self._forget(result.seq)
        for seq in sorted(silent & jobs.keys()):
            job = jobs[seq]
            job.ran = now
            job.used += duration
            if job.used > first * growth[job.level]:
                self._sink(job)
        self._until_check -= 1
        if self._until_check <= 0:
            self._check(view)
        self._lift_the_starved()

    def _know_job(self, seq: SeqId, now: float) -> None:
        """One has ended."""
        job = self._jobs.get(seq)
        if job is not None:
            took = now - job.seq.arrival
            self._job_s = took if self._job_s == inf else self._job_s + (took - self._job_s) / RECENT_JOBS

    def _check(self, view: View) -> None:
        """Goes on with those that the check before did not come to, else with all who wait below the top."""
        self._until_check = self.check_every
        self._since = view.now - self._starvation(view)
        tile_s = view.limits.page_tokens * cost(view, "prefill_token_s")
        self._lifts = max(1.0, LIFT_SHARE * (view.now - self._checked) / tile_s) if tile_s else inf
        self._checked = view.now
        if not self._unlooked:
            for queue in (*self._queues[1:], *self._new[1:]):
                self._unlooked.extend(queue)

    def _first_quantum(self, view: View) -> float:
        return self._step(view) if self.first_quantum_s is None else self.first_quantum_s

    def _starvation(self, view: View) -> float:
        """inf while no job has finished: those that compute will."""
        return STARVE_JOBS * self._job_s if self.starve_s is None else self.starve_s

    def _step(self, view: View) -> float:
        """Seconds of a step that only decodes."""
        return self._decode_s or decode_s(view, 1, 0)

    def _sink(self, job: Job) -> None:
        queue, seq = self._queue(job), job.seq
        waiting = seq.id in queue
        queue.discard(seq.id)
        self._set_level(job, job.level + 1)
        if waiting:
            self._wait(job, front=False)

    def _lift_the_starved(self) -> None:
        """The next few of those that waited at the last check: all of them may be starved."""
        for _ in range(min(LOOKED_AT, len(self._unlooked)) if self._lifts >= 1 else 0):
            seq = self._unlooked.popleft()
            job = self._jobs.get(seq.id)
            if job is not None and job.ran <= self._since and seq.id in (queue := self._queue(job)):
                queue.discard(seq.id)
                self._set_level(job, 0)
                self._wait(job, front=False)
                self._lifts -= 1
                if self._lifts < 1:
                    return

    def _set_level(self, job: Job, level: int) -> None:
        job.level, job.used = level, 0.0

    def _wait(self, job: Job, front: bool) -> None:
        self._stamp += 1
        self._queue(job).add(job.seq, -self._stamp if front else self._stamp)

    def _queue(self, job: Job) -> Queue:
        return (self._queues if job.started else self._new)[job.level]

    def _forget(self, seq: SeqId) -> None:
        job = self._jobs.pop(seq, None)
        if job is not None:
            self._queue(job).discard(seq)
            self._tokens -= job.seq.known if job.started else 0

    # Answers

    def rank(self, view: View) -> Iterator[SeqView]:
        jobs = self._jobs
        residents = self._residents = [[] for _ in range(self.levels)]
        self._displaced = 0
        for seq in view.residents():
            residents[jobs[seq.id].level].append(seq)
        room = self._room(view)
        for level in range(self.levels):
            yield from residents[level]
            for seq in self._queues[level]:
                if not self._has_place(level, view):
                    break
                if seq.ready:
                    yield seq
            for seq in self._new[level]:
                if seq.known > room or not self._has_place(level, view):
                    break
                if seq.ready:
                    yield seq
                    room -= seq.known if seq.resident else 0

    def _has_place(self, level: int, view: View) -> bool:
        """Whether a job of this level could be admitted: at the cost of a worse one, where no slot is free."""
        if not view.admitting or view.has_slot:
            return view.admitting
        for worse in reversed(self._residents[level + 1 :]):
            while worse and not worse[-1].resident:  # displaced by this plan, from the end as `victims` offers them
                worse.pop()
                self._displaced += 1
            if worse:
                return self._displaced < self.per_step
        return False

    def _room(self, view: View) -> float:
        """Tokens of new jobs that may be started; any, when nothing else is there. Host memory counts where a page
        comes and goes faster than it is computed."""
        host = iter(view.limits.host_pages if self._swap_pays(view) else ())
        pools = [[kind.pages + next(host, 0) for kind in group.classes] for group in view.groups]
        least = min((max(pages) for pages, g in zip(pools, view.groups, strict=True) if g.window is None), default=0)
        if not least or not self._tokens:
            return float("inf")
        return self.full * least * view.limits.page_tokens - self._tokens

    @staticmethod
    def _swap_pays(view: View) -> bool:
        page = sum(max(kind.bytes for kind in group.classes) for group in view.groups)
        most = view.limits.max_num_batched_tokens
        computed = view.limits.page_tokens * prefill_s(view, most) / most
        return 2 * page / view.limits.host_link_bytes_s < computed

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
