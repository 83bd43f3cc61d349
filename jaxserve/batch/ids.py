"""Which custom_ids a job has used: on disk beyond a few megabytes, so that memory does not grow with the job."""

from __future__ import annotations

import hashlib
import sqlite3


class Ids:
    def __init__(self) -> None:
        # An empty name is SQLite's private temporary database: in memory first, spilled to an unlinked file.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("PRAGMA cache_size = -16384")  # KiB
        self._db.execute("CREATE TABLE ids (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, custom_id: str) -> bool:
        """Remembers the id; False when it was there."""
        digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return self._db.execute("INSERT OR IGNORE INTO ids VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        self._db.close()
