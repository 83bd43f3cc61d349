"""The application before any engine has started: errors, keys, names of requests, the schema."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from jaxserve.api import AsyncLLM
from jaxserve.config import ServeConfig, build
from jaxserve.server.app import create_app
from jaxserve.server.errors import scrubbed

Ask = Callable[..., httpx.Response]


def asker(client: tuple[str, int] = ("127.0.0.1", 5), **options: object) -> Ask:
    """Requests to an application of these server options, from the given address."""
    config = build(ServeConfig, options)
    app = create_app(AsyncLLM(config.engine), config)

    def ask(method: str, path: str, **request: object) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
                return await http.request(method, path, **request)

        return asyncio.run(send())

    return ask


@pytest.mark.parametrize(
    "method,path,status",
    [
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/completions", 405),
        ("POST", "/v1/completions", 415),
        ("POST", "/version", 405),
    ],
)
def test_every_error_is_an_object(method: str, path: str, status: int):
    answer = asker()(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]


def test_what_we_did_not_expect_is_a_500_without_details(caplog: pytest.LogCaptureFixture):
    answer = asker()("POST", "/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "abc"})
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "abc"
    assert answer.json()["error"]["type"] == "server_error" and "Attribute" not in answer.text
    assert "request abc failed" in caplog.text


def test_keys_open_everything_that_is_not_open():
    ask = asker(api_key=("one", "two"), admin_api_key="root")
    assert ask("GET", "/version").status_code == 401
    assert ask("GET", "/nowhere").status_code == 401
    for key in ("one", "two", "root"):
        assert ask("GET", "/version", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for wrong in ("Bearer three", "Bearer one two", "Basic one", "one", "Bearer", "Bearer \xff"):
        assert ask("GET", "/version", headers={"Authorization": wrong.encode("latin-1")}).status_code == 401
    twice = [("Authorization", "Bearer one"), ("Authorization", "Bearer one")]
    assert ask("GET", "/version", headers=twice).status_code == 401


def test_a_prefix_of_a_proxy_does_not_open_routes():
    ask = asker(api_key=("one",), root_path="/llm")
    assert ask("GET", "/version").status_code == 401
    assert ask("GET", "/health/../version").status_code == 401


@pytest.mark.parametrize(
    "client,headers,status",
    [
        (("10.0.0.9", 5), {}, 403),
        (("127.0.0.1", 5), {"X-Forwarded-For": "10.0.0.9"}, 403),
        (("127.0.0.1", 5), {"Origin": "http://a.example"}, 403),
        (("::1", 5), {}, 415),
        (("127.0.0.1", 5), {}, 415),
    ],
)
def test_admin_routes_without_a_key_are_for_this_machine(client: tuple[str, int], headers: dict, status: int):
    """415: the request got past the check to its missing body."""
    assert asker(client)("POST", "/abort_requests", headers=headers).status_code == status


def test_the_schema_resolves():
    schema = asker()("GET", "/openapi.json").json()

    def references(node: object) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(references(value) for value in node.values()))
        return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()

    assert {"#/components/schemas/" + name for name in schema["components"]["schemas"]} >= references(schema) != set()


def test_engine_words_lose_paths_and_addresses():
    text = "XlaRuntimeError: in /usr/lib/python3/jax/core.py, line 5 at 0x7f3a9c001000."
    assert scrubbed(text) == "XlaRuntimeError: in (hidden), line 5 at (hidden)"
    assert scrubbed("the prompt has 5/7 tokens") == "the prompt has 5/7 tokens"
