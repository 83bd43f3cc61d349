"""Streaming clients that measure an OpenAI-compatible server: each keeps one completion running until none is left.

Speaks HTTP/1.1 over asyncio streams without a client library: on a machine with few cores the clients' own work would
otherwise be a good part of what is measured. Knows nothing of jax or of the server's insides.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from jaxserve.cli.errors import Failure
from jaxserve.sim.metrics import spread

Prompt = str | list[int]


@dataclass(frozen=True)
class Shot:
    """One request: when it was sent, when its first and last pieces came (s, one clock), and tokens in and out.
    `cached_tokens`: of the prompt, where the server says so; `pieces`: when each piece came."""

    sent: float
    first: float
    last: float
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int = 0
    pieces: tuple[float, ...] = ()

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per token after the first; None when there was one only."""
        return (self.last - self.first) / (self.new_tokens - 1) if self.new_tokens > 1 else None

    @property
    def latency(self) -> float:
        return self.last - self.sent


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


async def measure(
    base: str, prompts: Sequence[Prompt], clients: int, fields: dict[str, Any], headers: dict[str, str] | None = None
) -> list[Shot]:
    """Sends every prompt to `base`/v1/completions, `clients` at a time; `fields` are the rest of the body.

    Raises:
        Failure: the server refuses a request, breaks off, or does not answer.
    """
    waiting = deque(prompts)
    shots: list[Shot] = []

    async def client() -> None:
        while waiting:
            shots.append(await shoot(base, waiting.popleft(), fields, headers or {}))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(clients, len(prompts))):
                group.create_task(client())
    except* (OSError, asyncio.IncompleteReadError) as errors:
        raise Failure(f"{base} does not answer: {errors.exceptions[0]}") from None
    except* Failure as errors:
        raise errors.exceptions[0] from None
    return shots


async def shoot(base: str, prompt: Prompt, fields: dict[str, Any], headers: dict[str, str]) -> Shot:
    """One streamed completion."""
    body = msgspec.json.encode({"prompt": prompt, **fields, "stream": True, "stream_options": {"include_usage": True}})
    sent = time.perf_counter()
    pieces: list[float] = []
    usage: _Usage | None = None
    async for data in _post_events(base, "/v1/completions", body, headers):
        event = _decode(data)
        if event.error is not None:
            raise Failure(f"the server failed: {event.error}")
        if event.choices:
            pieces.append(time.perf_counter())
        usage = event.usage or usage
    if usage is None or not pieces:
        raise Failure(f"{base} ended a stream without tokens or usage")
    details = usage.prompt_tokens_details or _Details()
    return Shot(
        sent=sent,
        first=pieces[0],
        last=pieces[-1],
        prompt_tokens=usage.prompt_tokens,
        new_tokens=usage.completion_tokens,
        cached_tokens=details.cached_tokens or 0,
        pieces=tuple(pieces),
    )


async def _post_events(base: str, path: str, body: bytes, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The data of each server-sent event up to `[DONE]`."""
    address = urlsplit(base)
    secure = address.scheme == "https"
    reader, writer = await asyncio.open_connection(
        address.hostname, address.port or (443 if secure else 80), ssl=secure or None
    )
    try:
        lines = [
            f"POST {address.path}{path} HTTP/1.1",
            f"Host: {address.netloc}",
            "Content-Type: application/json",
            "Connection: close",
            f"Content-Length: {len(body)}",
            *(f"{k}: {v}" for k, v in headers.items()),
        ]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        if head.split(" ", 2)[1] != "200":
            raise Failure(f"{base} refused a request: {(await reader.read(2000)).decode(errors='replace').strip()}")
        chunked = "transfer-encoding: chunked" in head
        buffer = b""
        while piece := await (_chunk(reader) if chunked else reader.read(65536)):
            *whole, buffer = (buffer + piece).split(b"\n")
            for line in whole:
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if len(data) < len(line) and line.startswith(b"data:"):
                    yield data
    finally:
        writer.close()


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readline()).split(b";")[0] or b"0", 16)
    return (await reader.readexactly(size + 2))[:-2] if size else b""


def summary(shots: Sequence[Shot]) -> dict[str, float]:
    """Throughput over the whole run (tokens/s, requests/s) and latencies (ms)."""
    elapsed = max(shot.last for shot in shots) - min(shot.sent for shot in shots)
    new = sum(shot.new_tokens for shot in shots)
    result: dict[str, float] = {
        "requests": len(shots),
        "seconds": elapsed,
        "prompt_tokens": sum(shot.prompt_tokens for shot in shots),
        "new_tokens": new,
        "requests_per_s": len(shots) / elapsed,
        "new_tokens_per_s": new / elapsed,
    }
    for name, seconds in (
        ("ttft", [s.ttft for s in shots]),
        ("tpot", [s.tpot for s in shots if s.tpot is not None]),
        ("latency", [s.latency for s in shots]),
    ):
        result |= spread(name, [1000 * value for value in seconds], "ms")
    return result
