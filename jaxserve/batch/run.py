"""A batch job from file to file: resume, a window of requests in work, answers in order. Knows no engine and no HTTP:
`answer(url, body, number)` is whoever answers.

The window slides: up to `window` lines beyond the last written one are in work at once, so the scheduler may reorder
among that many, the engine never drains between windows, and memory is bounded by the window, not by the file.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.batch.ids import Ids
from jaxserve.batch.job import Answer, Job, Problem, answered, read_job, refused
from jaxserve.batch.lines import Lines
from jaxserve.batch.output import Output
from jaxserve.batch.progress import Progress
from jaxserve.config import ConfigError

AnswerTo = Callable[[str, dict[str, Any], int], Awaitable[Answer]]
"""(url, body, line number) -> what a server would say. Raises JobFailed when no line can be answered any more."""

POSITION_EVERY_S = 1.0
SUBMIT_BURST = 16
"""Lines started between two turns of the event loop: reading must not hold up answers."""


class JobFailed(RuntimeError):
    """The job cannot go on; what is written stays, and the same command continues it."""


@dataclass
class _Entry:
    job: Job
    before: dict[str, Any]
    """The reader's state in front of this line."""
    task: asyncio.Task[Answer] | None
    """None: the line is refused."""


def check_paths(source: Path, target: Path) -> None:
    """
    Raises:
        ConfigError: input missing, output's folder missing, one file for both.
    """
    if not source.is_file():
        raise ConfigError(f"-i {source} is not a file" if source.exists() else f"-i {source} does not exist")
    if target.is_dir():
        raise ConfigError(f"-o {target} is a folder; name a file in it")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"-o {target}: the folder {target.absolute().parent} does not exist")
    if target.exists() and target.samefile(source):
        raise ConfigError(f"-i and -o are the same file, {source}")


async def run_job(source: Path, target: Path, answer: AnswerTo, window: int, progress: bool = True) -> Progress:
    """Answers every line of `source` that `target` does not answer yet. Returns the counts.

    Raises:
        ConfigError: paths that cannot be used, or an output that belongs to another input.
        JobFailed: nothing can be answered any more.
    """
    check_paths(source, target)
    output, ids = Output(target), Ids()
    try:
        for custom_id in output.recover():
            ids.add(custom_id)
        jobs, done_bytes = _resume(source, output)
        counts = Progress(source.stat().st_size, output.lines, done_bytes)
        await _Window(jobs, ids, output, counts, answer, window, progress).run()
        output.forget_position()
        return counts
    finally:
        ids.close()
        output.close()


def _resume(source: Path, output: Output) -> tuple[Any, int]:
    """The iterator over jobs, standing behind the last line that is answered, and that line's end in bytes.

    A saved position is used when the answers fit it; otherwise the input is read from its beginning.
    """
    jobs: Any = iter(Lines(source).map(read_job))
    if output.lines == 0:
        return jobs, 0
    for state in (output.load_position(), jobs.get_state()):
        if state is None:
            continue
        jobs.set_state(state)
        last = _skip_to(jobs, state, output.lines)
        if last is not None and last.custom_id == output.last_id:
            return jobs, last.end
    raise ConfigError(
        f"-o {output.path} has {output.lines} answers, but the last one (custom_id {output.last_id!r}) does "
        f"not answer line {output.lines} of {source}; name another output file"
    )


def _skip_to(jobs: Any, state: dict[str, Any], lines: int) -> Job | None:
    try:
        jobs.set_state(state)
        for job in jobs:
            if job.number >= lines:
                return job
    except (OSError, ValueError, KeyError):
        pass
    return None


class _Window:
    """The lines between the last written one and the newest started one."""

    def __init__(
        self, jobs: Any, ids: Ids, output: Output, counts: Progress, answer: AnswerTo, window: int, show: bool
    ):
        self.jobs = jobs
        self.ids = ids
        self.output = output
        self.counts = counts
        self.answer = answer
        self.window = window
        self.show = show
        self.entries: deque[_Entry] = deque()
        self.saved_at = time.monotonic()
        self.more = True

    async def run(self) -> None:
        try:
            while self.more or self.entries:
                self.start_some()
                self.write_ready()
                if self.show:
                    self.counts.show(len(self.entries))
                await self.breathe()
        finally:
            tasks = [entry.task for entry in self.entries if entry.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def start_some(self) -> None:
        for _ in range(min(SUBMIT_BURST, self.window - len(self.entries))):
            before = self.jobs.get_state()
            job = next(self.jobs, None)
            if job is None:
                self.more = False
                return
            used = job.custom_id is not None and not self.ids.add(job.custom_id)
            if used and job.problem is None:
                problem = Problem("duplicate_custom_id", f"custom_id {job.custom_id!r} was used by an earlier line.")
                job = Job(job.number, job.end, job.custom_id, problem=problem)
            task = None
            if job.problem is None and job.body is not None:
                task = asyncio.ensure_future(self.answer(job.url, job.body, job.number))
            self.entries.append(_Entry(job, before, task))

    def write_ready(self) -> None:
        lines: list[bytes] = []
        before = None
        try:
            while self.entries and (self.entries[0].task is None or self.entries[0].task.done()):
                lines.append(self.line_of(self.entries[0]))
                before = self.entries.popleft().before
        finally:
            self.output.append(lines)
        now = time.monotonic()
        if before is not None and now - self.saved_at >= POSITION_EVERY_S:
            self.saved_at = now
            self.output.save_position(before)

    def line_of(self, entry: _Entry) -> bytes:
        job = entry.job
        if job.problem is not None or entry.task is None:
            self.counts.add(job.end, 0, 0, failed=True)
            return refused(job)
        answer = entry.task.result()
        self.counts.add(job.end, *answer.tokens, failed=answer.status != 200)
        return answered(job, answer)

    async def breathe(self) -> None:
        """Lets answers arrive: a turn of the loop while the window fills, until the oldest is done when it is full."""
        full = not self.more or len(self.entries) >= self.window
        head = self.entries[0].task if self.entries else None
        if full and head is not None and not head.done():
            await asyncio.wait({head}, timeout=0.5)
        else:
            await asyncio.sleep(0)
