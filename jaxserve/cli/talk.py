"""Who answers `chat` and `complete`: an engine in this process, or any OpenAI-compatible server.

Both take OpenAI request bodies and give the answer's text piece by piece. The server's side imports no jax.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Generator, Iterator
from typing import Any, Protocol

from jaxserve.cli.errors import Failure
from jaxserve.config import ConfigError
from jaxserve.types import ParamError

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"


class Talker(Protocol):
    def stream(self, url: str, body: dict[str, Any]) -> Generator[str, None, None]:
        """Pieces of the answer to `body` at `url` (CHAT or COMPLETE). Closing the iterator ends the request.

        Raises:
            ParamError: the request was refused.
            Failure: nobody answers.
        """
        ...

    def close(self) -> None: ...


def add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server", "Instead of an engine in this process.")
    group.add_argument("--url", metavar="URL", help="Ask the OpenAI-compatible server there; --model names its model.")
    group.add_argument("--api-key", metavar="KEY", help="Key for it. Default: the variable OPENAI_API_KEY.")


def talker(args: argparse.Namespace) -> Talker:
    """Who the arguments ask for."""
    if args.url is not None:
        return Remote(args.url, args.api_key, getattr(args, "model", None))
    from jaxserve.cli.local import Local
    from jaxserve.cli.parser import engine_config

    return Local(engine_config(args))


def api_base(url: str) -> str:
    """`http://host:8000` of any spelling of a server's address.

    Raises:
        ConfigError: not an http address.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url!r} is not an address such as http://127.0.0.1:8000")
    return base


def auth_headers(api_key: str | None) -> dict[str, str]:
    key = api_key or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


class Remote:
    def __init__(self, url: str, api_key: str | None, model: str | None):
        import httpx

        self._base = api_base(url)
        self._client = httpx.Client(timeout=httpx.Timeout(None, connect=10.0), headers=auth_headers(api_key))
        self._model = model

    def stream(self, url: str, body: dict[str, Any]) -> Generator[str, None, None]:
        import httpx

        try:
            if self._model is None:
                self._model = self._first_model()
            request = {**body, "model": self._model, "stream": True}
            with self._client.stream("POST", self._base + url, json=request) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(self._base, response.status_code, response.text)
                yield from _texts(response.iter_lines())
        except httpx.HTTPError as error:
            raise Failure(f"{self._base} does not answer: {str(error) or type(error).__name__}") from None

    def _first_model(self) -> str:
        response = self._client.get(self._base + "/v1/models")
        if response.status_code != 200:
            raise _refusal(self._base, response.status_code, response.text)
        return response.json()["data"][0]["id"]

    def close(self) -> None:
        self._client.close()


def _texts(lines: Iterator[str]) -> Iterator[str]:
    """The text of each event of a server's stream.

    Raises:
        Failure: an error that the server reports half-way.
    """
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise Failure(f"the server failed: {_message_of(event)}")
        for choice in event.get("choices", ()):
            text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            if text:
                yield text


def _refusal(base: str, status: int, text: str) -> Exception:
    try:
        error = json.loads(text)
        message, param = _message_of(error), error["error"].get("param")
    except (ValueError, TypeError, KeyError, AttributeError):
        message, param = text.strip()[:200] or f"status {status}", None
    if status in (400, 404, 413, 422):
        return ParamError(param or "", message)
    return Failure(f"{base} answers {status}: {message}")


def _message_of(event: dict[str, Any]) -> str:
    error = event["error"]
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
