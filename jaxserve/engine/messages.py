"""The front end's half of the engine protocol: requests out, answers to who waits for them. Knows no transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.config import ConfigError
from jaxserve.engine.client import DeltaSink, EngineDead
from jaxserve.types import (
    Cancel,
    Control,
    Deltas,
    ExportPrefix,
    Failed,
    FromCore,
    ImportPrefix,
    Prefix,
    PrefixPage,
    Ready,
    Request,
    Stats,
    Submit,
    SubmitAll,
    ToCore,
)

CLOSED = "the engine has been closed"


class MessageClient:
    """What every EngineClient does, whatever carries its messages. A subclass brings `start`, `close` and `_send`."""

    def __init__(self) -> None:
        self._controls: dict[int, asyncio.Future[Any]] = {}
        self._failure: str | None = None
        self._closing = False

    def submit(self, request: Request) -> None:
        self._put(Submit(request=request))

    def submit_all(self, requests: Sequence[Request]) -> None:
        self._put(SubmitAll(requests=tuple(requests)))

    def cancel(self, ids: Sequence[str]) -> None:
        if not self._closing:
            self._put(Cancel(ids=tuple(ids)))

    async def control(self, verb: str, program: str = "") -> Stats:
        return await self._ask(lambda token: Control(verb=verb, token=token, program=program))

    async def export_prefix(self, tokens: Sequence[int], salt: str = "") -> Prefix:
        return await self._ask(lambda token: ExportPrefix(token=token, tokens=tuple(tokens), salt=salt))

    async def import_prefix(self, tokens: Sequence[int], pages: Sequence[PrefixPage], salt: str = "") -> Prefix:
        came = tuple(pages)
        return await self._ask(lambda token: ImportPrefix(token=token, tokens=tuple(tokens), pages=came, salt=salt))

    @property
    def failure(self) -> str | None:
        return self._failure

    async def wait_failed(self) -> str:
        return await asyncio.shield(self._failed)

    async def _ask(self, question: Callable[[int], ToCore]) -> Any:
        """The answer to the message that `question` makes of a token."""
        token = max(self._controls, default=0) + 1
        self._put(question(token))
        future = self._controls[token] = self._loop.create_future()
        return await future

    def _open(self, sink: DeltaSink) -> None:
        """Called by `start`, on the event loop's thread."""
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._failed: asyncio.Future[str] = self._loop.create_future()

    def _send(self, message: ToCore) -> None:
        raise NotImplementedError

    def _put(self, message: ToCore) -> None:
        if self._failure is not None or self._closing:
            raise EngineDead(self._failure or CLOSED)
        self._send(message)

    def _receive(self, message: FromCore) -> None:
        """Takes what the core said, on the event loop's thread."""
        if isinstance(message, Deltas):
            self._sink(message.deltas)
        elif isinstance(message, Ready):
            if not self._ready.done():  # whoever waited may have given up
                self._ready.set_result(message)
        elif isinstance(message, Stats | Prefix):
            future = self._controls.pop(message.token, None)
            if future is not None and not future.done():
                future.set_result(message)
        elif isinstance(message, Failed):
            self._fail(message.cause, ConfigError(message.cause) if message.refused else EngineDead(message.cause))

    def _fail(self, cause: str, error: Exception) -> None:
        """The core is gone, or never came. `error` is for who waits in `start`."""
        self._failure = cause
        if not self._ready.done():
            self._ready.set_exception(error)
        self._disappoint(cause)
        if not self._failed.done():
            self._failed.set_result(cause)

    def _disappoint(self, cause: str) -> None:
        """Nobody will answer what has been asked."""
        for future in self._controls.values():
            if not future.done():
                future.set_exception(EngineDead(cause))
        self._controls.clear()
