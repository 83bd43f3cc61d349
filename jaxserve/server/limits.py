"""What a request may cost before it is understood: sizes, counts and times. Knows HTTP, not models.

Limits on what a request asks of the model (lengths, counts of choices and log-probs) are `types.ModelLimits`.
"""

from __future__ import annotations

import asyncio
import re

from starlette.requests import Request

from jaxserve.server.errors import ApiError

MAX_PROMPTS = 1024
"""Prompts in one completion request."""
MAX_HEADERS = 128
MAX_HEADER_BYTES = 64 * 1024
BODY_TIMEOUT_S = 60.0
"""From the headers to the last byte of the body: a client that trickles is cut off."""
HEADER_TIMEOUT_S = 30.0
"""From the first byte of a connection to the end of its first headers."""
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")
"""A client's X-Request-Id that is worth repeating."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a JSON request, never holding more than `max_bytes` of it.

    Raises:
        ApiError: 415 for another media type or a compressed body, 413 for one that is too large, 408 for one that does
            not arrive in time.
        ClientDisconnect: the client went away.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, not {media[:80] or 'missing'}.")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, f"Content-Encoding {encoding[:80]} is not accepted; send the JSON uncompressed.")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(part)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s.", headers={"Connection": "close"}
        ) from None
    return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {max_bytes} bytes.")
