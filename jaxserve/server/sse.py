"""Server-sent events: framing, keep-alive, and a response that stops its source when the client hangs up."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.server.connection import ClientGone, while_connected
from jaxserve.server.errors import as_api_error, error_object, error_response

log = logging.getLogger("jaxserve.server")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_S = 15.0
"""A comment goes out when nothing else did for this long, so that proxies keep the connection."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_encode = msgspec.json.Encoder().encode


def event(value: Any) -> bytes:
    return b"data: %b\n\n" % _encode(value)


class EventStream(Response):
    """Sends the chunks of `source` (whole events, as bytes) as they come.

    A source that fails before its first chunk makes an ordinary error response, later an error event; a stream that
    began ends with `[DONE]` in any case. A slow reader holds back the source, not memory: `send` waits until the socket
    takes the chunk. When the client hangs up, the task that iterates over `source` is cancelled. `close` is called at
    the end, whichever way it comes.
    """

    def __init__(self, source: AsyncIterator[bytes], close: Callable[[], None], headers: dict[str, str] | None = None):
        self.source = source
        self.close = close
        self.status_code = 200
        self.background = None
        self.raw_headers = _HEADERS + [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        last_sent, started = monotonic(), False

        async def begin() -> None:
            nonlocal started
            started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def pump() -> None:
            nonlocal last_sent
            try:
                async for chunk in self.source:
                    if not started:
                        await begin()
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    last_sent = monotonic()
            except Exception as error:
                known = as_api_error(error)
                if known.status == 500 and known is not error:
                    log.error("request %s failed while streaming", scope.get("jaxserve.request_id", ""), exc_info=error)
                if not started:
                    await error_response(known)(scope, receive, send)
                    return
                await send({"type": "http.response.body", "body": event(error_object(known)), "more_body": True})
            if not started:
                await begin()
            await send({"type": "http.response.body", "body": DONE, "more_body": False})

        async def keep_alive() -> None:
            if monotonic() - last_sent >= KEEP_ALIVE_S:
                if not started:
                    await begin()
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

        try:
            await while_connected(receive, pump(), idle_s=KEEP_ALIVE_S, on_idle=keep_alive)
        except ClientGone:
            pass
        finally:
            self.close()
