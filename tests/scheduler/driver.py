"""Plays the engine: feeds a scheduler with requests and results, runs its plans on the symbolic device."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO

from jaxserve.scheduler import Limits, Policy, Recorder, Scheduler, make_policy
from jaxserve.types import (
    Abort,
    Arrive,
    CloseProgram,
    MoveDone,
    PageClass,
    PageClasses,
    Plan,
    SeqId,
    SeqResult,
    StepDone,
    Tick,
)
from tests.scheduler.device import Chain, Device, extend, next_token


def groups_of(*pools: tuple[int, int | None]) -> tuple[PageClasses, ...]:
    """KV groups from (pages, window)."""
    return tuple(PageClasses(classes=(PageClass(name="kv", pages=n, bytes=1),), window=w) for n, w in pools)


def two_classes(open: int, sealed: int, window: int | None = None, sinks: int = 1, residual: int = 1) -> PageClasses:
    """A KV group with `open` 16-bit and `sealed` sealed pages."""
    classes = (PageClass(name="bf16", pages=open, bytes=4), PageClass(name="sealed", pages=sealed, bytes=1))
    return PageClasses(classes=classes, window=window, sink_pages=sinks, residual_pages=residual)


def limits_of(**changes: object) -> Limits:
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 256, "max_model_len": 1024, "max_tiles": 4}
    merged = {**small, **changes}
    merged.setdefault("max_decode_rows", merged["max_num_seqs"])
    return Limits(**merged)  # type: ignore[arg-type]


@dataclass
class Host:
    """What the engine knows of a sequence. `stop`: generated tokens after which it ends."""

    tokens: list[int]
    chain: Chain
    prompt: int
    choice: int
    stop: int
    hashed: int
    page_tokens: int
    cached: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def generated(self) -> int:
        return len(self.chain) - 1 - self.prompt

    def completed(self) -> tuple[bytes, ...]:
        full = (len(self.chain) - 1) // self.page_tokens
        names = page_names(self.chain, self.hashed, full, self.page_tokens)
        self.hashed = max(full, self.hashed)
        return names


def page_names(chain: Chain, first: int, end: int, page_tokens: int) -> tuple[bytes, ...]:
    return tuple(str(chain[(i + 1) * page_tokens]).encode() for i in range(first, end))


class Driver:
    """One engine with a symbolic device. Times are step numbers."""

    def __init__(
        self,
        policy: str | Policy = "sarathi",
        limits: Limits | None = None,
        groups: tuple[PageClasses, ...] | None = None,
        accepted: Callable[[], int] = lambda: 0,
        move_steps: int = 1,
    ) -> None:
        self.limits = limits or limits_of()
        self.groups = groups or groups_of((64, None))
        self.record = BytesIO()
        self.scheduler = Scheduler(
            make_policy(policy) if isinstance(policy, str) else policy, self.limits, self.groups, Recorder(self.record)
        )
        self.device = Device(self.limits, self.groups)
        self.hosts: dict[SeqId, Host] = {}
        self.plans: list[Plan] = []
        self.preempted: list[SeqId] = []
        self._accepted = accepted
        self._in_flight: deque[tuple[int, dict[SeqId, list[int]]]] = deque()
        self._moves: deque[tuple[int, int]] = deque()
        """Moves under way, and the step after which they are done."""
        self.move_steps = move_steps
        self._now = 0.0

    def arrive(
        self,
        seq: SeqId,
        prompt: Sequence[int] | int,
        max_new: int = 8,
        stop: int | None = None,
        parent: SeqId | None = None,
        choice: int = 0,
        salt: int = 0,
        **fields: object,
    ) -> bool:
        """A prompt given as a number is that many tokens nobody else has. False: it could never run."""
        tokens = [seq * 100_003 + i for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
        chain: Chain = [salt]
        for token in tokens:
            extend(chain, token)
        end = min(stop or max_new, max_new, max(1, self.limits.max_model_len - len(tokens)))
        size = self.limits.page_tokens
        host = Host(tokens, chain, len(tokens), choice, end, len(tokens) // size, size)
        names = page_names(chain, 0, host.hashed, size)
        if program := fields.get("program"):
            fields["shared"] = self._shared(str(program), tokens)
        arrive = Arrive(
            now=self._now, seq=seq, prompt=len(tokens), max_new=max_new, hashes=names, parent=parent, **fields
        )  # type: ignore[arg-type]
        if self.scheduler.can_ever_fit(arrive) is not None:
            return False
        self.hosts[seq] = host
        self.scheduler.on_event(arrive)
        return True

    def _shared(self, program: str, tokens: list[int]) -> int:
        pinned = self.scheduler.pinned(program)
        if pinned is None:
            return 0
        pairs = zip(self.hosts[pinned].tokens, tokens, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.hosts[pinned].tokens), len(tokens)))

    def close(self, program: str) -> None:
        self.scheduler.on_event(CloseProgram(now=self._now, program=program))

    def abort(self, seq: SeqId) -> None:
        self.scheduler.on_event(Abort(now=self._now, seq=seq))
        self.hosts[seq].finished = True

    def step(self) -> Plan:
        """Plans, runs, and reports the step that is `lag` behind."""
        self._now += 1.0
        while self._moves and self._moves[0][1] <= len(self.plans):
            number, _ = self._moves.popleft()
            self.device.finish_move(number)
            self.scheduler.on_event(MoveDone(now=self._now, move=number))
        self.scheduler.on_event(Tick(now=self._now))
        plan = self.scheduler.plan()
        self.scheduler.check_integrity()
        self.plans.append(plan)
        self.preempted.extend(plan.preempted)
        for admit in plan.admits:
            self.hosts[admit.seq].cached.append(admit.cached)
        self._moves.extend((move.id, len(self.plans) + self.move_steps) for move in plan.moves)
        launched = None
        if plan.has_work:
            samples = self.device.execute(
                plan, lambda seq: (self.hosts[seq].chain, self.hosts[seq].choice), lambda _: self._accepted()
            )
            launched = (plan.step, samples)
            self._in_flight.append(launched)
        else:
            assert not (plan.admits or plan.pages.grants or plan.pages.copies or plan.pages.seals)
            assert plan.moves or not plan.preempted
            self.device.move(plan)
        while len(self._in_flight) > (self.limits.lag if launched else 0):
            self._report(*self._in_flight.popleft())
        self.scheduler.check_integrity()
        return plan

    def _report(self, step: int, samples: dict[SeqId, list[int]]) -> None:
        results = []
        for seq, tokens in samples.items():
            host = self.hosts[seq]
            if host.finished:
                continue
            taken = tokens[: host.stop - host.generated]
            for token in taken:
                assert token == next_token(host.chain, host.choice)
                extend(host.chain, token)
                host.tokens.append(token)
            host.finished = host.generated >= host.stop
            results.append(SeqResult(seq, len(taken), host.finished, host.completed()))
        self.scheduler.on_event(StepDone(now=self._now, step=step, duration=1.0, results=tuple(results)))

    def run(self) -> None:
        """Until all have finished, within a few times the steps that they would take one by one."""
        most = 100 + (3 + self.move_steps) * sum(
            host.prompt // self.limits.page_tokens + host.stop + 4 for host in self.hosts.values()
        )
        for _ in range(most):
            if not self.scheduler.has_unfinished:
                return
            self.step()
        left = {seq: host.generated for seq, host in self.hosts.items() if not host.finished}
        raise AssertionError(f"after {most} steps there is no end; generated so far: {left}")


def accept_randomly(seed: int, q: int) -> Callable[[], int]:
    draw = random.Random(seed)
    return lambda: draw.randrange(q)


def admitted(driver: Driver) -> list[int]:
    """Sequences in the order in which they got a place."""
    return [admit.seq for plan in driver.plans for admit in plan.admits]
