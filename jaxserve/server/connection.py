"""One HTTP connection: limits on its headers, and what happens when the client hangs up. Knows nothing of routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from jaxserve.server.errors import ApiError, error_object
from jaxserve.server.limits import HEADER_TIMEOUT_S, MAX_HEADER_BYTES, MAX_HEADERS

T = TypeVar("T")


class _TooLarge(Exception):
    """Headers beyond the limits."""


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on headers, in size and in time, and errors as objects."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._deadline: asyncio.TimerHandle | None = None
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_here()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._in_headers = True
        self._received = 0
        self._parsed = 0
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self.timeout_keep_alive_handler)

    def _headers_are_here(self) -> None:
        self._in_headers = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def data_received(self, data: bytes) -> None:
        # The parser hands out a header when it is whole, so an endless one must be noticed here.
        if self._in_headers:
            self._received += len(data)
        super().data_received(data)
        if self._in_headers and self._received > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(431, "The headers of this request are too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))
        if len(self.headers) > MAX_HEADERS:
            raise _TooLarge

    def _count(self, size: int) -> None:
        self._parsed += size
        if self._parsed > MAX_HEADER_BYTES:
            raise _TooLarge

    def on_headers_complete(self) -> None:
        self._headers_are_here()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """The parser failed: what uvicorn would say in plain text, as an error object."""
        if self._in_headers and (len(self.headers or ()) > MAX_HEADERS or self._parsed > MAX_HEADER_BYTES):
            self._refuse(431, "The headers of this request are too large.")
        else:
            self._refuse(400, "This is not a valid HTTP request.")

    def _refuse(self, status: int, message: str) -> None:
        body = msgspec.json.encode(error_object(ApiError(status, message)))
        self.transport.write(
            b"".join(
                (
                    STATUS_LINE[status],
                    b"content-type: application/json\r\nconnection: close\r\n",
                    b"content-length: %d\r\n\r\n" % len(body),
                    body,
                )
            )
        )
        self.transport.close()


class ClientGone(Exception):
    """The client hung up before its answer was complete."""


async def while_connected(
    receive: Receive,
    work: Coroutine[Any, Any, T],
    *,
    idle_s: float | None = None,
    on_idle: Callable[[], Awaitable[None]] | None = None,
) -> T:
    """Runs `work` and cancels it when the client hangs up; calls `on_idle` every `idle_s` seconds meanwhile.

    The body must have been read: from then on the only message to come is the disconnect.

    Raises:
        ClientGone: the client hung up; `work` has ended by then.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_hung_up(receive, idle_s, on_idle))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGone
    finally:
        watcher.cancel()
        if not worker.done():
            worker.cancel()
            await asyncio.wait((worker,))


async def _hung_up(receive: Receive, idle_s: float | None, on_idle: Callable[[], Awaitable[None]] | None) -> None:
    while True:
        try:
            async with asyncio.timeout(idle_s):
                message = await receive()
        except TimeoutError:
            if on_idle is not None:
                await on_idle()
            continue
        if message["type"] == "http.disconnect":
            return
