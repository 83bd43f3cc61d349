"""The ASGI application: routes and what wraps them. An AsyncLLM comes from outside; see main.py for a whole server."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.api import AsyncLLM
from jaxserve.config import ServeConfig
from jaxserve.server import admin, chat, completions, errors, health, models, programs, protocol, tokenize
from jaxserve.server.auth import AuthMiddleware
from jaxserve.server.limits import REQUEST_ID
from jaxserve.server.serving import Serving

ROUTERS: Sequence[APIRouter] = (
    completions.router,
    chat.router,
    models.router,
    tokenize.router,
    health.router,
    programs.router,
    admin.router,
)

BODIES: dict[str, type[protocol.Body]] = {
    "/v1/completions": protocol.CompletionBody,
    "/v1/chat/completions": protocol.ChatBody,
    "/tokenize": protocol.TokenizeBody,
    "/detokenize": protocol.DetokenizeBody,
    "/abort_requests": protocol.AbortBody,
    "/close_program": protocol.CloseProgramBody,
}
"""What POST routes read. They parse it themselves, to bound it and to word what is wrong."""


def create_app(llm: AsyncLLM, config: ServeConfig) -> FastAPI:
    """The application for `llm`, which the application's lifespan starts and closes."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await llm.start()
            yield
        finally:
            await llm.close()

    app = FastAPI(title="jaxserve", version=health.package_version(), docs_url=None, redoc_url=None, lifespan=lifespan)
    serving = app.state.serving = Serving(llm, config)
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app)
    app.add_middleware(AuthMiddleware, keys=serving.keys, admin=serving.admin_keys)
    if config.server.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.server.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Jaxserve-Ignored"],
        )
    app.add_middleware(RequestIdMiddleware)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class RequestIdMiddleware:
    """Repeats a client's X-Request-Id if it is sane, else makes one up. It names the request in logs, nowhere else."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = scope["jaxserve.request_id"] = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def name(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = list(message.get("headers", ()))
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, name)


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_OTHER_MEDIA = {
    "/v1/completions": "text/event-stream",
    "/v1/chat/completions": "text/event-stream",
    "/metrics": "text/plain",
}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema with the bodies that the routes read themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        names, definitions = models_json_schema(
            [(body, "validation") for body in BODIES.values()], ref_template="#/components/schemas/{model}"
        )
        schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        schema["components"]["schemas"]["Error"] = _ERROR
        failure = {"description": "What went wrong", "content": _json({"$ref": "#/components/schemas/Error"})}
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"]["default"] = failure
        for path, body in BODIES.items():
            operation = schema["paths"][path]["post"]
            operation["requestBody"] = {"required": True, "content": _json(names[body, "validation"])}
        for path, media in _OTHER_MEDIA.items():
            (operation,) = schema["paths"][path].values()
            operation["responses"]["200"]["content"][media] = {"schema": {"type": "string"}}
        app.openapi_schema = schema
    return app.openapi_schema
