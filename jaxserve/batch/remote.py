"""Answers batch lines by asking an OpenAI-compatible server. Imports no jax and no engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from jaxserve.batch.job import Answer
from jaxserve.batch.run import AnswerTo, JobFailed

PATIENCE_S = 60.0
"""How long a server may be out of reach before the job gives up."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
BUSY = frozenset({408, 425, 429, 502, 503, 504})
"""Answers that ask to come again."""


@asynccontextmanager
async def remote_answers(base: str, headers: Mapping[str, str], concurrency: int) -> AsyncIterator[AnswerTo]:
    """Sends at most `concurrency` lines at a time to the server at `base`."""
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    timeout = httpx.Timeout(None, connect=10.0)
    async with httpx.AsyncClient(base_url=base, headers=dict(headers), limits=limits, timeout=timeout) as client:
        yield _Remote(client, base, concurrency)


class _Remote:
    def __init__(self, client: httpx.AsyncClient, base: str, concurrency: int):
        self._client = client
        self._base = base
        self._slots = asyncio.Semaphore(concurrency)
        self._heard = time.monotonic()
        """When the server last said anything."""

    async def __call__(self, url: str, body: dict[str, Any], number: int) -> Answer:
        async with self._slots:
            pause = FIRST_PAUSE_S
            while True:
                wait = pause
                try:
                    response = await self._client.post(url, json=body)
                    self._heard = time.monotonic()
                    if response.status_code not in BUSY:
                        return _answer(response)
                    wait = _retry_after(response) or pause
                except httpx.TransportError as error:
                    if time.monotonic() - self._heard > PATIENCE_S:
                        raise JobFailed(f"{self._base} does not answer: {str(error) or type(error).__name__}") from None
                await asyncio.sleep(wait)
                pause = min(2 * pause, LONGEST_PAUSE_S)


def _answer(response: httpx.Response) -> Answer:
    """
    Raises:
        JobFailed: the key is refused: every other line would be, too.
    """
    if response.status_code in (401, 403):
        raise JobFailed(f"the server refuses the key ({response.status_code}): set --api-key or OPENAI_API_KEY")
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        text = response.text[:500]
        body = {"error": {"message": text, "type": "server_error", "param": None, "code": response.status_code}}
    return Answer(response.status_code, body)


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return min(float(response.headers["retry-after"]), LONGEST_PAUSE_S)
    except (KeyError, ValueError):
        return None
