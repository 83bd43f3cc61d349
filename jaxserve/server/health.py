"""Whether the server lives, what it is and how busy it is."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.api import QueueFull
from jaxserve.engine.client import EngineDead
from jaxserve.server.errors import ApiError, overloaded, scrubbed
from jaxserve.server.metrics import CONTENT_TYPE
from jaxserve.server.serving import RETRY_AFTER_S, Serving, serving_of
from jaxserve.types import SamplingParams

router = APIRouter()

PROBE_TIMEOUT_S = 30.0
STATS_TIMEOUT_S = 5.0
"""A step may take this long on a slow machine; the engine answers between steps."""


def package_version() -> str:
    try:
        return version("jaxserve")
    except PackageNotFoundError:
        return "unknown"


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """200 while requests are taken; 503 with the cause when the engine has ended or the server is about to."""
    serving = serving_of(request)
    _check_alive(serving)
    return {"status": "ok"}


@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
async def ping(request: Request) -> dict[str, Any]:
    return await health(request)


@router.get("/health_generate")
async def health_generate(request: Request) -> dict[str, Any]:
    """As /health, after a token has really been generated."""
    serving = serving_of(request)
    _check_alive(serving)
    start = serving.llm.tokenizer.bos_token_id or 0
    params = SamplingParams(max_tokens=1, temperature=0.0)
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            async with await serving.llm.submit([start], params) as stream:
                async for _ in stream:
                    pass
    except TimeoutError:
        raise overloaded(f"No token was generated within {PROBE_TIMEOUT_S:.0f} s.", RETRY_AFTER_S) from None
    except QueueFull as full:
        raise overloaded(f"The server is full: {full}.", RETRY_AFTER_S) from None
    if stream.state.error is not None:
        raise ApiError(503, f"Generation fails: {scrubbed(stream.state.error)}.", code="generation_failed")
    return {"status": "ok"}


def _check_alive(serving: Serving) -> None:
    if serving.llm.failure is not None:
        raise ApiError(503, f"The engine has ended: {scrubbed(serving.llm.failure)}.", code="engine_dead")
    if serving.draining:
        raise overloaded("The server is shutting down.", RETRY_AFTER_S)


@router.get("/version")
async def get_version() -> dict[str, str]:
    return {"version": package_version()}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Sequences that wait or run."""
    return {"server_load": serving_of(request).llm.unfinished}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    serving = serving_of(request)
    try:
        async with asyncio.timeout(STATS_TIMEOUT_S):
            engine = await serving.llm.stats()
    except (TimeoutError, EngineDead):
        engine = None
    return Response(serving.metrics.render(engine), media_type=CONTENT_TYPE)
