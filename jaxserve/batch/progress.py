"""How far a batch job is, on stderr: one line that rewrites itself on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

TERMINAL_EVERY_S = 0.5
LOG_EVERY_S = 10.0


class Progress:
    """Counts lines, tokens and errors, and shows them. `total_bytes` is the input's size: the share of the work that is
    done is told by bytes, so that nobody has to count the lines of a long file first."""

    def __init__(self, total_bytes: int, done_lines: int = 0, done_bytes: int = 0, out: TextIO | None = None):
        self.total_bytes = total_bytes
        self.lines = done_lines
        self.bytes = done_bytes
        self.errors = 0
        self.prompt_tokens = 0
        self.new_tokens = 0
        self._resumed_lines, self._resumed_bytes = done_lines, done_bytes
        self._out = out or sys.stderr
        self._start = self._shown = time.monotonic()
        self._width = 0

    def add(self, end: int, prompt_tokens: int, new_tokens: int, failed: bool) -> None:
        """One more line is written; `end` is where it ended in the input."""
        self.lines += 1
        self.bytes = end
        self.errors += failed
        self.prompt_tokens += prompt_tokens
        self.new_tokens += new_tokens

    def show(self, running: int) -> None:
        now = time.monotonic()
        terminal = self._out.isatty()
        if now - self._shown < (TERMINAL_EVERY_S if terminal else LOG_EVERY_S):
            return
        self._shown = now
        text = self._text(now, running)
        if terminal:
            self._out.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._out.write(text + "\n")
        self._out.flush()

    def _text(self, now: float, running: int) -> str:
        share = self.bytes / self.total_bytes if self.total_bytes else 1.0
        fresh = self.bytes - self._resumed_bytes
        left = (self.total_bytes - self.bytes) / fresh * (now - self._start) if fresh > 0 else None
        eta = "?" if left is None else duration(left)
        errors = f"  {self.errors} errors" if self.errors else ""
        return (
            f"{self.lines} lines  {share:4.0%}  {self.rate(now):,.0f} tokens/s  {running} in work{errors}  {eta} left"
        )

    def rate(self, now: float) -> float:
        """Generated tokens per second since the start."""
        return self.new_tokens / max(now - self._start, 1e-9)

    def finish(self) -> None:
        """The job's last words: what was written, how fast, how much of it errors."""
        now = time.monotonic()
        if self._width:
            self._out.write("\r" + " " * self._width + "\r")
        resumed = f" ({self._resumed_lines} of them by earlier runs)" if self._resumed_lines else ""
        self._out.write(
            f"jaxserve: {self.lines} lines{resumed} in {duration(now - self._start)}: {self.prompt_tokens:,} "
            f"prompt and {self.new_tokens:,} new tokens, {self.rate(now):,.0f} tokens/s; {self.errors} errors\n"
        )
        self._out.flush()


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3:20`, `2:03:20`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
