"""Every failure as OpenAI's error object. Knows HTTP status codes; knows nothing of engines.

A message is written for the client: it may quote what the client sent, never a path, an address or a traceback of ours.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, cast

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from jaxserve.engine.client import EngineDead
from jaxserve.types import ParamError

log = logging.getLogger("jaxserve.server")

_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
}


class ApiError(Exception):
    """An answer other than 200. `param` names the field at fault, `code` is for programs, `headers` go out with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})


def invalid(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def overloaded(message: str, retry_after_s: int = 1) -> ApiError:
    return ApiError(503, message, code="overloaded", headers={"Retry-After": str(retry_after_s)})


def error_object(error: ApiError) -> dict[str, Any]:
    """The body of an error, as OpenAI's clients read it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> Response:
    return Response(msgspec.json.encode(error_object(error)), error.status, error.headers, "application/json")


def _sentence(message: str) -> str:
    return message if message.endswith((".", "!", "?")) else message + "."


_PATHS = re.compile(r"(?:/[^\s/:'\",]+){2,}/?|0x[0-9a-fA-F]{6,}")


def scrubbed(message: str) -> str:
    """An engine's words without the paths and addresses that they may hold."""
    return _PATHS.sub("(hidden)", message.rstrip("."))


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about an exception. Anything unexpected becomes a 500 without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ParamError):
        return invalid(_sentence(str(error)), error.param)
    if isinstance(error, EngineDead):
        return ApiError(503, f"The engine has ended: {scrubbed(str(error))}.", code="engine_dead")
    return ApiError(
        500, "The server failed to answer this request; its log has the cause under the X-Request-Id of this response."
    )


async def _on_api_error(request: Request, error: Exception) -> Response:
    return error_response(as_api_error(error))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    messages = {
        404: f"There is no route {request.method} {request.url.path[:200]}.",
        405: f"{request.url.path[:200]} does not take {request.method}.",
    }
    headers = dict(error.headers or {})
    return error_response(
        ApiError(error.status_code, messages.get(error.status_code, str(error.detail)), headers=headers)
    )


async def _on_validation_error(request: Request, error: Exception) -> Response:
    error = cast(RequestValidationError, error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return error_response(invalid(f"{where}: {first['msg']}", where or None))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_failure(request: Request, error: Exception) -> Response:
    request_id = request.scope.get("jaxserve.request_id", "")
    log.error("request %s failed", request_id, exc_info=error)
    response = error_response(as_api_error(error))
    if request_id:
        response.headers["X-Request-Id"] = request_id
    return response


def install(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(ParamError, _on_api_error)
    app.add_exception_handler(EngineDead, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_failure)
