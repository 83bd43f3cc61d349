"""Lines of a file as a Grain dataset whose position can be saved. Knows nothing of JSON.

The file is read forwards, a line at a time, so a file of any length takes the memory of its longest line; lines above
`max_bytes` are skipped over and reported without their content.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain

MAX_LINE_BYTES = 32 * 1024**2
"""The largest request body that the server takes by default."""


@dataclass(frozen=True)
class Line:
    """`number` counts from 1; `end` is the byte offset behind it; `data` None: longer than the limit."""

    number: int
    end: int
    data: bytes | None


class Lines(grain.IterDataset[Line]):
    """The lines of `path`, without their line feeds.

    An iterator's `get_state()` is `{"line": lines read, "offset": bytes read}`.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_LINE_BYTES):
        super().__init__()
        self.path = path
        self.max_bytes = max_bytes

    def __iter__(self) -> LinesIterator:
        return LinesIterator(self.path, self.max_bytes)


class LinesIterator(grain.DatasetIterator[Line]):
    def __init__(self, path: Path, max_bytes: int):
        super().__init__()
        self._file = open(path, "rb")
        self._max_bytes = max_bytes
        self._line = 0
        self._offset = 0

    def __next__(self) -> Line:
        data: bytes | None = self._file.readline(self._max_bytes + 1)
        if not data:
            raise StopIteration
        self._offset += len(data)
        if len(data) > self._max_bytes and not data.endswith(b"\n"):
            self._skip_rest()
            data = None
        self._line += 1
        return Line(self._line, self._offset, None if data is None else data.removesuffix(b"\n"))

    def _skip_rest(self) -> None:
        while piece := self._file.readline(1 << 20):
            self._offset += len(piece)
            if piece.endswith(b"\n"):
                return

    def get_state(self) -> dict[str, Any]:
        return {"line": self._line, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._line = state["line"]
        self._offset = state["offset"]
        self._file.seek(self._offset)

    def close(self) -> None:
        self._file.close()
