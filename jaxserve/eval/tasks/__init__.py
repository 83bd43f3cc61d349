"""Generated retrieval tasks: seeded, pure, of any length. What an answer should be is known exactly."""

from __future__ import annotations

from jaxserve.eval.tasks.copy import copy
from jaxserve.eval.tasks.document import Document, Room, Task, TooShort, Turn
from jaxserve.eval.tasks.kv import kv_recall
from jaxserve.eval.tasks.needle import multi_needle, needle
from jaxserve.eval.tasks.two_hop import two_hop
from jaxserve.eval.tasks.variables import variable_tracking

RETRIEVAL: dict[str, Task] = {
    "kv-recall": kv_recall,
    "needle": needle,
    "multi-needle": multi_needle,
    "two-hop": two_hop,
    "copy": copy,
    "variable-tracking": variable_tracking,
}

__all__ = ["RETRIEVAL", "Document", "Room", "Task", "TooShort", "Turn"]
