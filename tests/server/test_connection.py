"""Work ends when its client hangs up, and keep-alives go out meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from jaxserve.server.connection import ClientGone, while_connected
from jaxserve.server.errors import ApiError
from jaxserve.server.sse import EventStream


async def never() -> dict:
    await asyncio.Event().wait()
    return {}


def test_the_result_of_work_that_finishes():
    async def work() -> int:
        await asyncio.sleep(0)
        return 5

    assert asyncio.run(while_connected(never, work())) == 5


def test_work_is_cancelled_and_awaited_when_the_client_goes():
    steps = []

    async def gone() -> dict:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            steps.append("cleaned")

    with pytest.raises(ClientGone):
        asyncio.run(while_connected(gone, work()))
    assert steps == ["cleaned"]


def test_failures_of_work_are_its_own():
    async def work() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(while_connected(never, work()))


def test_idle_calls_come_while_nothing_happens():
    calls = []

    async def idle() -> None:
        calls.append(1)

    asyncio.run(while_connected(never, asyncio.sleep(0.06), idle_s=0.01, on_idle=idle))
    assert 2 <= len(calls) <= 6


def sent_by(source: AsyncIterator[bytes]) -> list[dict]:
    """The messages of a stream, which must close its source once."""
    sent: list[dict] = []
    closed: list[int] = []

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(EventStream(source, lambda: closed.append(1))({"type": "http"}, never, send))
    assert closed == [1]
    return sent


def test_a_stream_that_fails_before_it_began_is_an_ordinary_error():
    async def source() -> AsyncIterator[bytes]:
        raise ApiError(400, "No.")
        yield b""

    start, body = sent_by(source())
    assert start["status"] == 400 and b'"message":"No."' in body["body"]


def test_a_stream_that_fails_later_says_so_and_ends():
    async def source() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        raise ApiError(500, "Generation failed.", code="generation_failed")

    sent = sent_by(source())
    assert sent[0]["status"] == 200
    body = b"".join(message.get("body", b"") for message in sent)
    assert body.startswith(b'data: 1\n\ndata: {"error"') and body.endswith(b"data: [DONE]\n\n")
    assert not sent[-1]["more_body"]
