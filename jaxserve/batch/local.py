"""Answers batch lines with an engine in this process. The server's code reads bodies and builds answers, without its
HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from jaxserve.api import AsyncLLM
from jaxserve.batch.job import Answer
from jaxserve.batch.run import AnswerTo, JobFailed
from jaxserve.config import EngineConfig, ServeConfig
from jaxserve.engine.client import EngineDead
from jaxserve.server import chat, completions
from jaxserve.server.errors import ApiError, as_api_error, error_object
from jaxserve.server.job import Job
from jaxserve.server.protocol import ChatBody, CompletionBody, parse
from jaxserve.server.serving import Serving

log = logging.getLogger("jaxserve.batch")

FULL_PAUSE_S = 0.05

Start = Callable[[Serving, bytes], Awaitable[Job]]


@asynccontextmanager
async def local_answers(config: EngineConfig, window: int) -> AsyncIterator[AnswerTo]:
    """An engine that takes a whole window of lines, for as long as the context lasts.

    Raises:
        ConfigError, CheckpointError, EngineDead: the engine cannot start.
    """
    queue = max(window, config.scheduler.max_queued_requests)
    config = dataclasses.replace(config, scheduler=dataclasses.replace(config.scheduler, max_queued_requests=queue))
    llm = AsyncLLM(config)
    await llm.start()
    try:
        yield _Local(Serving(llm, ServeConfig(engine=config)), config.model.seed)
    finally:
        await llm.close()


async def _start_chat(serving: Serving, body: bytes) -> Job:
    return await chat.start(serving, parse(ChatBody, body))


async def _start_completion(serving: Serving, body: bytes) -> Job:
    return await completions.start(serving, parse(CompletionBody, body))


_STARTS: dict[str, Start] = {"/v1/chat/completions": _start_chat, "/v1/completions": _start_completion}


class _Local:
    def __init__(self, serving: Serving, seed: int):
        self._serving = serving
        self._seed = seed

    async def __call__(self, url: str, body: dict[str, Any], number: int) -> Answer:
        raw = msgspec.json.encode(self._seeded(body, number))
        try:
            job = await self._admitted(_STARTS[url], raw)
            try:
                answer = await job.whole()
            finally:
                job.close()
            return Answer(200, msgspec.to_builtins(answer))
        except EngineDead as error:
            raise JobFailed(f"the engine failed: {error}") from None
        except Exception as error:  # one line cannot hurt another
            told = as_api_error(error)
            if told.status == 500 and not isinstance(error, ApiError):
                log.exception("line %d failed", number)
            return Answer(told.status, error_object(told))

    async def _admitted(self, start: Start, raw: bytes) -> Job:
        """The line's job as soon as the engine takes it: lines with many choices may fill its queue."""
        while True:
            try:
                return await start(self._serving, raw)
            except ApiError as error:
                if error.status != 503 or self._serving.llm.unfinished == 0:
                    raise
            await asyncio.sleep(FULL_PAUSE_S)

    def _seeded(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        """The body with a seed that only the line's place decides, so that a resumed job samples what an uninterrupted
        one would have. Several prompts in one line draw their own seeds: equal ones would give equal answers."""
        prompt = body.get("prompt")
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        if several or body.get("seed") is not None:
            return body
        digest = hashlib.blake2b(f"{self._seed}:{number}".encode(), digest_size=8).digest()
        return {**body, "seed": int.from_bytes(digest, "big") >> 1}
