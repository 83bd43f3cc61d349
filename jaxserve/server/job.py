"""One generating HTTP request: its prompts in the engine, and how its answer leaves, whole or as a stream.

Subclasses say what an answer looks like (completions.py, chat.py).
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.api import Stream
from jaxserve.server.connection import ClientGone, while_connected
from jaxserve.server.errors import ApiError, invalid, scrubbed
from jaxserve.server.logprobs import TokenNames
from jaxserve.server.metrics import RequestWatch
from jaxserve.server.protocol import Generation
from jaxserve.server.responses import ChunkWriter, Usage, field
from jaxserve.server.serving import Encoded, Serving
from jaxserve.server.sse import EventStream
from jaxserve.text.processor import ChoiceDelta, RequestDelta, RequestState
from jaxserve.types import SamplingParams

_encode = msgspec.json.Encoder().encode


class Job(ABC):
    """A request that the engine has accepted. Ends with `close()`, which cancels what still runs."""

    id_prefix: str
    chunk_object: str

    def __init__(self, serving: Serving, body: Generation, model: str, request_id: str, streams: Sequence[Stream]):
        self.serving = serving
        self.body = body
        self.model = model
        self.id = request_id
        self.created = int(time.time())
        self.streams = streams
        self.choices = streams[0].state.request.params.n
        self.names = TokenNames(serving.llm.tokenizer, bool(body.return_tokens_as_token_ids))
        self.continuous_usage = body.continuous_usage
        self._begun: set[int] = set()
        """Choices whose stream has begun."""
        self._watches = [RequestWatch(serving.metrics, stream.state) for stream in streams]

    @classmethod
    async def start(
        cls, serving: Serving, body: Any, model: str, prompts: Sequence[Encoded], params: Sequence[SamplingParams]
    ) -> Any:
        request_id = f"{cls.id_prefix}-{uuid.uuid4().hex}"
        streams = await serving.submit(prompts, params, body, request_id)
        return cls(serving, body, model, request_id, streams)

    @abstractmethod
    def answer(self) -> msgspec.Struct:
        """The whole answer, when everything has been generated."""

    @abstractmethod
    def chunk(self, writer: ChunkWriter, prompt: int, delta: RequestDelta) -> bytes:
        """The events that say what is new; empty if there is nothing to say."""

    @property
    def states(self) -> list[RequestState]:
        return [stream.state for stream in self.streams]

    def usage(self) -> Usage:
        states = self.states
        return Usage.of(
            sum(len(state.request.prompt) for state in states),
            sum(map(self.generated, states)),
            sum(state.cached_tokens for state in states),
        )

    def generated(self, state: RequestState) -> int:
        """Tokens generated for a prompt, as the client counts them."""
        return state.generated

    async def respond(self, request: Request) -> Response:
        headers = {"X-Jaxserve-Ignored": _header(names)} if (names := self.body.ignored()) else {}
        if self.body.stream:
            return EventStream(self._events(), self.close, headers)
        try:
            answer = await while_connected(request.receive, self.whole())
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        finally:
            self.close()
        return Response(_encode(answer), 200, headers, "application/json")

    async def whole(self) -> msgspec.Struct:
        """
        Raises:
            ApiError: the engine could not finish a prompt. EngineDead: the engine ended.
        """
        for stream, watch in zip(self.streams, self._watches, strict=True):
            async for delta in stream:
                watch.saw(delta)
            _raise_error(stream.state)
        return self.answer()

    async def _events(self) -> AsyncIterator[bytes]:
        body = self.body
        writer = ChunkWriter(self.id, self.chunk_object, self.created, self.model, body.include_usage)
        async for prompt, delta in self._deltas():
            self._watches[prompt].saw(delta)
            if delta.error is not None:
                _raise_error(self.streams[prompt].state)
            if events := self.chunk(writer, prompt, delta):
                yield events
        if body.include_usage:
            yield writer.usage(self.usage())

    async def _deltas(self) -> AsyncIterator[tuple[int, RequestDelta]]:
        """What every prompt gains, with the prompt's index, as it comes."""
        if len(self.streams) == 1:
            async for delta in self.streams[0]:
                yield 0, delta
            return
        # Bounded, so that a slow reader holds back the pumps and deltas merge where they arise.
        ready: asyncio.Queue[tuple[int, RequestDelta | BaseException | None]] = asyncio.Queue(len(self.streams))

        async def pump(index: int, stream: Stream) -> None:
            try:
                async for delta in stream:
                    await ready.put((index, delta))
                await ready.put((index, None))
            except Exception as error:
                await ready.put((index, error))

        pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(self.streams)]
        try:
            running = len(pumps)
            while running:
                index, item = await ready.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield index, item
        finally:
            for task in pumps:
                task.cancel()

    def close(self) -> None:
        for stream, watch in zip(self.streams, self._watches, strict=True):
            stream.close()
            watch.ended()


def finish_fields(choice: ChoiceDelta) -> bytes:
    """How a chunk says why its choice ended, or that it goes on."""
    if choice.finish_reason is None:
        return b',"finish_reason":null'
    return field(b"finish_reason", choice.finish_reason) + field(b"stop_reason", choice.stop_reason)


def _raise_error(state: RequestState) -> None:
    if state.error is None:
        return
    message = f"{scrubbed(state.error)}."
    if state.refused:
        raise invalid(f"The engine cannot take this request: {message}", "prompt")
    raise ApiError(500, f"Generation failed: {message}", code="generation_failed")


def _header(names: Sequence[str]) -> str:
    """Names as a header may carry them."""
    return ", ".join(re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64]) for name in names[:32])
