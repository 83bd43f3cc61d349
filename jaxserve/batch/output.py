"""The output file of a batch job: whole lines appended in order, and where a job that died left off.

The number of whole lines is the resume point: a line is there or it is not, whatever killed the writer. Beside the
output lies `OUTPUT.position`, the state of the input's reader at a line that is surely written: it only saves reading
the input's beginning again, and a stale one does no harm.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from jaxserve.config import ConfigError


class _Head(msgspec.Struct):
    custom_id: str | None


class Output:
    """An output file, locked for one writer.

    `lines` is the number of whole lines; `last_id` the custom_id of the last one.

    Raises:
        ConfigError: the file cannot be written, is in use, or holds something else than answers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.position_path = path.with_name(path.name + ".position")
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigError(f"-o {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise ConfigError(f"-o {path} is being written by another job") from None
        self.lines = 0
        self.last_id: str | None = None

    def recover(self) -> Iterator[str]:
        """Counts the whole lines, cuts a torn last one, and yields the custom_ids that are done."""
        end = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    head = msgspec.json.decode(line, type=_Head)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    raise ConfigError(
                        f"-o {self.path} holds something else than answers of a batch job (line "
                        f"{self.lines + 1}); name another file or remove it"
                    ) from None
                self.lines += 1
                self.last_id = head.custom_id
                end += len(line)
                if head.custom_id is not None:
                    yield head.custom_id
        os.ftruncate(self._fd, end)

    def append(self, lines: list[bytes]) -> None:
        """Writes whole lines; they are the kernel's when this returns."""
        data = memoryview(b"".join(lines))
        while data:
            data = data[os.write(self._fd, data) :]
        self.lines += len(lines)

    def load_position(self) -> dict[str, Any] | None:
        """A saved reader's state at or before the resume point."""
        try:
            state = json.loads(self.position_path.read_text())
            usable = 0 <= int(state["line"]) <= self.lines and int(state["offset"]) >= 0
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return state if usable else None

    def save_position(self, state: dict[str, Any]) -> None:
        draft = self.position_path.with_name(self.position_path.name + ".new")
        draft.write_text(json.dumps(state))
        draft.replace(self.position_path)

    def forget_position(self) -> None:
        self.position_path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._fd)
