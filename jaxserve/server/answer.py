"""Answers to OpenAI bodies without HTTP, for batch files and the command line: the same parsing, the same answers."""

from __future__ import annotations

from typing import Any

import msgspec

from jaxserve.server import chat, completions
from jaxserve.server.errors import ApiError, as_api_error, error_object
from jaxserve.server.job import Job
from jaxserve.server.protocol import ChatBody, CompletionBody, parse
from jaxserve.server.serving import Serving

URLS = ("/v1/chat/completions", "/v1/completions")


async def start(serving: Serving, url: str, body: dict[str, Any]) -> Job:
    """The job that a POST of `body` to `url` would start; whoever has it closes it.

    Raises:
        ApiError, ParamError, EngineDead: why there is none.
    """
    raw = msgspec.json.encode(body)
    if url == "/v1/chat/completions":
        return await chat.start(serving, parse(ChatBody, raw))
    if url == "/v1/completions":
        return await completions.start(serving, parse(CompletionBody, raw))
    raise ApiError(404, f"There is no route POST {url[:200]}; use one of {', '.join(URLS)}.")


async def answer(serving: Serving, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(status, body) as the server would answer; failures are error objects, except an engine that died.

    Raises:
        EngineDead: the engine has ended; no further body will be answered.
    """
    try:
        job = await start(serving, url, body)
        try:
            return 200, msgspec.to_builtins(await job.whole())
        finally:
            job.close()
    except Exception as error:
        known = as_api_error(error)
        if known.code == "engine_dead" or (known.status == 500 and known is not error):
            raise
        return known.status, error_object(known)
