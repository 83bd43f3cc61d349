"""Who may ask. Deny by default: with keys configured every route needs one, except those that say whether we live.

Keys are kept as SHA-256 digests and compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ping"})
_LOOPBACK = frozenset({"127.0.0.1", "::1", "::ffff:127.0.0.1"})
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


class Keys:
    """A set of bearer keys."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, presented: str | None) -> bool:
        """Compares with every key, so that the time taken does not tell which one was close."""
        digest = _digest(presented or "")
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return presented is not None and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def bearer(connection: HTTPConnection) -> str | None:
    """The key of `Authorization: Bearer KEY`, or None for any other scheme or a repeated header."""
    values = connection.headers.getlist("authorization")
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


class AuthMiddleware:
    """Refuses requests without a valid key. The admin key opens every route."""

    def __init__(self, app: ASGIApp, keys: Keys, admin: Keys):
        self.app = app
        self.keys = keys
        self.admin = admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and not self._admitted(scope):
            error = ApiError(
                401,
                "This server needs a key: send the header `Authorization: Bearer KEY`.",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _admitted(self, scope: Scope) -> bool:
        if scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS:
            return True
        key = bearer(HTTPConnection(scope))
        return self.keys.admit(key) or self.admin.admit(key)


def require_admin(request: Request, admin: Keys) -> None:
    """Lets a request through to an admin route: with the admin key, or without one configured, from this machine only.

    What a proxy forwarded or a web page sent (`Origin`) does not count as local, wherever its last hop was.

    Raises:
        ApiError: 403.
    """
    if admin:
        if not admin.admit(bearer(request)):
            raise ApiError(403, "This route needs the admin key: `Authorization: Bearer KEY`.")
        return
    local = request.client is None or request.client.host in _LOOPBACK
    if not local or "origin" in request.headers or any(name in request.headers for name in _PROXY_HEADERS):
        raise ApiError(
            403,
            "This route answers to the machine it runs on only; start the server with --admin-api-key "
            "to use it from elsewhere.",
        )
