"""Messages on their way into an engine core, from any thread. Knows nothing of what they mean."""

from __future__ import annotations

import threading
from collections import deque

from jaxserve.engine.moved import Moved, Transferred
from jaxserve.types import ToCore

Message = ToCore | Moved | Transferred


class Inbox:
    """An unbounded queue with one reader. Front ends bound what they submit (`--max-queued-requests`)."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._arrived = threading.Event()

    def put(self, message: Message) -> None:
        self._messages.append(message)
        self._arrived.set()

    def drain(self) -> list[Message]:
        """Everything that has arrived, in order. Never waits."""
        drained = []
        while self._messages:
            drained.append(self._messages.popleft())
        return drained

    def wait(self, timeout: float | None) -> None:
        """Returns when something has arrived, or after `timeout` seconds."""
        self._arrived.wait(timeout)
        self._arrived.clear()
        if self._messages:
            self._arrived.set()
