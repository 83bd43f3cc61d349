"""How a front end talks to an engine core, wherever the core runs. Imports no jax; knows nothing of text or HTTP.

`ThreadClient` runs the core on a thread of this process (library, batch jobs), `ProcessClient` starts it as a process
of its own behind a Unix socket (server). Both speak the messages of types.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from jaxserve.types import Delta, Prefix, PrefixPage, Ready, Request, Stats

DeltaSink = Callable[[Sequence[Delta]], None]
"""Called on the event loop's thread with what a step produced, all requests together, in order."""


class EngineDead(RuntimeError):
    """The engine core cannot go on; the message is the cause."""


class EngineClient(Protocol):
    """One engine core, seen from an asyncio front end. All methods are called on one event loop's thread."""

    async def start(self, sink: DeltaSink) -> Ready:
        """Starts the core and waits until it can serve.

        Raises:
            ConfigError, CheckpointError: what the core refused, with its message.
            EngineDead: the core failed to start.
        """
        ...

    def submit(self, request: Request) -> None:
        """Queues a request. Its deltas come through the sink; the last delta of every choice carries `finish`."""
        ...

    def submit_all(self, requests: Sequence[Request]) -> None:
        """Queues requests so that the core plans no step before it has them all."""
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """Ends requests; no further delta of theirs reaches the sink after the core has read this."""
        ...

    async def control(self, verb: str, program: str = "") -> Stats:
        """Runs a verb of types.Control, on a program where it wants one, and returns the core's statistics after it."""
        ...

    async def export_prefix(self, tokens: Sequence[int], salt: str = "") -> Prefix:
        """The cached KV of the beginning of `tokens`, as far as whole pages of it are cached: `count` tokens, `pages`
        to be imported elsewhere. `error` if the core does not export."""
        ...

    async def import_prefix(self, tokens: Sequence[int], pages: Sequence[PrefixPage], salt: str = "") -> Prefix:
        """Brings pages that were exported for `tokens` into the prefix cache, where the next request that begins so
        finds them as long as nobody needs the room. `count`: tokens that are cached then. `error`: why nothing was
        imported; a core refuses pages that are damaged or of another model, options, tokens or salt."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the core ended, or None while it lives."""
        ...

    async def wait_failed(self) -> str:
        """Returns the cause when the core dies without having been asked to."""
        ...

    async def close(self, drain: float = 0.0) -> None:
        """Ends the core; gives running requests up to `drain` seconds. Idempotent."""
        ...
