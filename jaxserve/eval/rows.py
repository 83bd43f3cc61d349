"""Results: one row for each scored item, without a time or a name that could differ between two runs. Knows files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from jaxserve.config import ConfigError

Key = tuple[str, int, str]
"""Task, length, mode: what names a cell of the table."""


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One scored item.

    `document` and `turn` name it in its cell. `score` is better when larger: 0 or 1 for an answer, the mean log-prob
    (nats a token) of a text. `logprob`: of the generated tokens, summed; it moves before an answer does. `tokens` and
    `bytes` count what a text's score was taken over.
    """

    task: str
    length: int
    mode: str
    document: int
    turn: int
    score: float
    depth: float | None = None
    question: str | None = None
    answer: str | None = None
    output: str | None = None
    token_ids: tuple[int, ...] = ()
    logprob: float | None = None
    tokens: int = 0
    bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def key(self) -> Key:
        return (self.task, self.length, self.mode)

    @property
    def item(self) -> tuple[str, int, str, int, int]:
        return (*self.key, self.document, self.turn)


def by_key(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows by cell, in their order."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row)
    return found


class RowFile:
    """A JSONL file of rows, written cell by cell: after an interruption it is cut back to its whole cells."""

    def __init__(self, path: Path):
        self._path = path
        self._encoder = msgspec.json.Encoder()

    def whole_cells(self, expected: dict[Key, int]) -> dict[Key, list[Row]]:
        """The cells that are complete; rows of broken ones are cut off the file.

        Raises:
            ConfigError: a whole line that is no row.
        """
        found = by_key(self._read()) if self._path.exists() else {}
        whole = {key: rows for key, rows in found.items() if expected.get(key, len(rows)) == len(rows)}
        kept = b"".join(self._line(row) for rows in whole.values() for row in rows)
        if self._path.exists() and kept != self._path.read_bytes():
            part = self._path.with_suffix(".part")
            part.write_bytes(kept)
            part.replace(self._path)
        return whole

    def append(self, rows: Iterable[Row]) -> None:
        with self._path.open("ab") as file:
            file.write(b"".join(self._line(row) for row in rows))

    def _line(self, row: Row) -> bytes:
        return self._encoder.encode(row) + b"\n"

    def _read(self) -> Iterator[Row]:
        decoder = msgspec.json.Decoder(Row)
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return  # cut off while it was written
                try:
                    yield decoder.decode(line)
                except msgspec.MsgspecError as error:
                    raise ConfigError(f"{self._path}, line {number} is not a result: {error}") from None
