"""Input that must be refused with OpenAI's error object and must leave no trace."""

from __future__ import annotations

import gzip
import json
import socket
from typing import Any

import httpx
import pytest

from .conftest import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
pytestmark = pytest.mark.usefixtures("unharmed")


def assert_refused(answer: httpx.Response, statuses: tuple[int, ...] = (400,)) -> dict[str, Any]:
    assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == "invalid_request_error"
    return error


def refuse_each(http: httpx.Client, path: str, base: dict, cases: list[dict]) -> None:
    """Refused alone and as a stream: nothing may be sent before the request is known to be good."""
    for case in cases:
        for stream in (False, True):
            raw = json.dumps({**base, "stream": stream, **case})
            answer = http.post(path, content=raw, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, (case, answer.status_code, answer.text[:300])
            assert_refused(answer)


def test_bodies_that_are_no_requests(http: httpx.Client):
    deep = b"[" * 100_000 + b"]" * 100_000
    bodies = [
        b"",
        b"null",
        b"42",
        b"[]",
        b'"text"',
        b'{"prompt": "a"',
        b"\xff\xfe{}",
        b'{"prompt": "\x00"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a\xff"}',
        deep,
        b'{"prompt": "a", "metadata": ' + deep + b"}",
        b"\xef\xbb\xbf{}",
        b"{'prompt': 'a'}",
        b'{"prompt": "a",}',
    ]
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        for body in bodies:
            assert_refused(http.post(path, content=body, headers={"Content-Type": "application/json"}))


def test_duplicate_keys_count_once(http: httpx.Client):
    answer = http.post(
        COMPLETIONS,
        content=b'{"prompt": "a", "max_tokens": 500, "max_tokens": 2, "ignore_eos": true}',
        headers={"Content-Type": "application/json"},
    )
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_media_types_and_encodings(http: httpx.Client):
    raw = b'{"prompt": "a"}'
    for media in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert_refused(http.post(COMPLETIONS, content=raw, headers={"Content-Type": media}), (415,))
    bomb = gzip.compress(b" " * 10_000_000)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert_refused(http.post(COMPLETIONS, content=bomb, headers=headers), (415,))


def test_bodies_that_are_too_large(http: httpx.Client):
    announced = http.post(
        COMPLETIONS, content=b'{"prompt": "' + b"a" * (33 << 20) + b'"}', headers={"Content-Type": "application/json"}
    )
    assert assert_refused(announced, (413,))["code"] == "request_too_large"

    def trickle():
        for _ in range(40):
            yield b" " * (1 << 20)

    assert_refused(http.post(COMPLETIONS, content=trickle(), headers={"Content-Type": "application/json"}), (413,))


@pytest.mark.parametrize(
    "lines",
    [[f"X-{i}: 1" for i in range(300)], ["X-Large: " + "a" * (5 << 20)], ["no colon"]],
    ids=["many", "large", "malformed"],
)
def test_headers_beyond_measure(server: Server, lines: list[str]):
    head = "\r\n".join(["GET /health HTTP/1.1", "Host: x", *lines, "", ""]).encode()
    with socket.create_connection(server.address, timeout=10) as connection:
        try:
            connection.sendall(head)
        except OSError:
            pass  # the server may close while we still write
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            pass
    if answer:  # a reset may take the answer with it
        assert answer.split()[1] in (b"400", b"431")
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"


def test_models(http: httpx.Client):
    assert_refused(http.post(COMPLETIONS, json={"prompt": "a", "model": "nobody"}), (404,))
    refuse_each(http, COMPLETIONS, {"prompt": "a"}, [{"model": ["small"]}, {"model": {"id": "small"}}, {"model": 1}])


def test_prompts(http: httpx.Client, server: Server):
    width = 10**6
    wrong = [
        "",
        [],
        [[]],
        [""],
        ["a"] * 1025,
        ["a", 1],
        [1, "a"],
        [[1], "a"],
        [-1],
        [width],
        [2**31],
        [2**63],
        [2**80],
        [1.5],
        [True],
        [[1, None]],
        None,
        5,
        {"text": "a"},
        [[1], []],
        ["a", ""],
    ]
    refuse_each(http, COMPLETIONS, {"max_tokens": 1}, [{"prompt": prompt} for prompt in wrong])


def test_messages(http: httpx.Client):
    def user(content: object) -> list:
        return [{"role": "user", "content": content}]

    wrong = [
        None,
        "text",
        [123],
        [{}],
        [{"role": 123, "content": "a"}],
        [{"role": "poet", "content": "a"}],
        [],
        user(None),
        user(123),
        user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]),
        user([{"type": "input_audio"}]),
        user([{"type": "text"}]),
        [{"role": "assistant", "content": "a", "function_call": {"name": "f"}}],
        user("a") * 10_000,
    ]
    refuse_each(http, CHAT, {"max_tokens": 1}, [{"messages": messages} for messages in wrong])


def test_two_assistants_in_a_row_are_the_templates_business(http: httpx.Client):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "assistant")]
    assert http.post(CHAT, json={"messages": turns, "max_tokens": 1}).status_code in (200, 400)


def test_lengths(http: httpx.Client):
    longest = http.get("/v1/models").json()["data"][0]["max_model_len"]
    base = {"prompt": "a"}
    wrong: list[dict] = [{"max_tokens": value} for value in (0, -1, longest, longest + 1, 2**63 - 1, 2**63, 1.5, "5")]
    wrong += [{"prompt": [5] * count, "max_tokens": 1} for count in (longest, longest + 1, longest * 100)]
    wrong += [{"prompt": "word " * (longest * 100)}, {"min_tokens": 9, "max_tokens": 3}, {"min_tokens": -1}]
    wrong += [{"truncate_prompt_tokens": value} for value in (0, -2, longest + 1, "1")]
    refuse_each(http, COMPLETIONS, base, wrong)
    fits = http.post(COMPLETIONS, json={"prompt": [5] * (longest - 1), "max_tokens": 1})
    assert fits.status_code == 200, fits.text


NOT_NUMBERS = [float("nan"), float("inf"), float("-inf"), "0.5", True, [], {}]


@pytest.mark.parametrize(
    "name,values",
    [
        ("temperature", [1e308, -1]),
        ("top_p", [0, -1, 1.5, 1e308]),
        ("min_p", [-1, 1.5]),
        ("presence_penalty", [-3, 3, 1e308]),
        ("frequency_penalty", [-3, 3]),
        ("repetition_penalty", [0, -1, 1e308]),
        ("top_k", [-2, 2**63, 1.5]),
        ("n", [0, -1, 10**9, 1.5]),
        ("seed", [2**63, 2**64, -(2**63) - 1, 1.5]),
        ("priority", [2**40, 1.5]),
        ("logprobs", [21, -2, 10**9]),
        ("prompt_logprobs", [21, -2]),
    ],
)
def test_numbers_out_of_range(http: httpx.Client, name: str, values: list):
    cases = [{name: value} for value in (*values, *NOT_NUMBERS)]
    refuse_each(http, COMPLETIONS, {"prompt": "a", "max_tokens": 1}, cases)


@pytest.mark.parametrize(
    "extra",
    [
        {"temperature": 1e-30},
        {"top_k": 10**6},
        {"top_k": 0},
        {"top_k": -1},
        {"seed": -5},
        {"seed": 2**63 - 1},
        {"min_p": 1},
        {"top_p": 1e-6},
        {"temperature": 2, "n": 2},
    ],
)
def test_edges_that_are_in_range(http: httpx.Client, extra: dict):
    answer = http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2, **extra})
    assert answer.status_code == 200, answer.text


def test_log_probs_of_chats(http: httpx.Client):
    base = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    refuse_each(
        http,
        CHAT,
        base,
        [
            {"top_logprobs": 3},
            {"logprobs": False, "top_logprobs": 3},
            {"logprobs": True, "top_logprobs": 21},
            {"logprobs": True, "top_logprobs": -1},
            {"logprobs": 5},
            {"logprobs": "true"},
        ],
    )
    answer = http.post(CHAT, json={**base, "logprobs": True, "top_logprobs": 21})
    assert assert_refused(answer)["param"] == "top_logprobs"


def test_stops(http: httpx.Client):
    wrong: list[dict] = [{"stop": stop} for stop in ([""], "", ["a"] * 100, "a" * (1 << 20), [1], {"a": 1})]
    wrong += [{"stop_token_ids": ids} for ids in ([10**6], [-1], ["a"], [5] * 100)]
    refuse_each(http, COMPLETIONS, {"prompt": "a", "max_tokens": 1}, wrong)


def test_biases_and_bans(http: httpx.Client):
    biases = (
        {"foo": 1},
        {"-1": 1},
        {"1000000": 1},
        {"5": float("nan")},
        {"5": 1e9},
        {"5": "1"},
        {"5": True},
        [5],
        {str(2**70): 1},
        {"٣": 1},
    )
    wrong: list[dict] = [{"logit_bias": bias} for bias in biases]
    wrong += [{"allowed_token_ids": ids} for ids in ([], [10**6], [-1], ["a"], [2**63])]
    wrong += [{"bad_words": words} for words in ([""], [f"w{i}" for i in range(1000)], [1], ["a b " * 500])]
    refuse_each(http, COMPLETIONS, {"prompt": "a", "max_tokens": 1}, wrong)


def test_stream_options(http: httpx.Client):
    for options in ({"include_usage": True}, {}):
        answer = http.post(COMPLETIONS, json={"prompt": "a", "stream": False, "stream_options": options})
        assert assert_refused(answer)["param"] == "stream_options"
    fine = {"prompt": "a", "max_tokens": 1, "stream": True, "stream_options": {"include_usage": None}}
    assert http.post(COMPLETIONS, json=fine).status_code == 200
    for wrong in ({"include_usage": 1}, [], {"include_everything": True}):
        assert_refused(http.post(COMPLETIONS, json={"prompt": "a", "stream": True, "stream_options": wrong}))


@pytest.mark.parametrize(
    "extra",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
        {"response_format": "json"},
        {"response_format": {"type": "sound"}},
        {"guided_regex": "(a+)+b"},
        {"structured_outputs": {"json": {}}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"modalities": ["audio"]},
        {"audio": {"voice": "a"}},
        {"store": True},
        {"chat_template": "{% for i in range(10**9) %}a{% endfor %}"},
        {"documents": []},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"__class__": 1}},
        {"chat_template_kwargs": [1]},
        {"reasoning_effort": "high"},
        {"cache_salt": ""},
        {"cache_salt": "a" * 200},
        {"cache_salt": "a b"},
        {"prompt_embeds": "AAAA"},
    ],
)
def test_what_is_not_supported_is_refused(http: httpx.Client, extra: dict):
    refuse_each(http, CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}, [extra])


def test_errors_do_not_show_our_insides(http: httpx.Client):
    for body in (b"{", b'{"prompt": [1, "a"]}', b'{"prompt": "a", "model": "/etc/passwd"}'):
        text = http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"}).text
        assert "Traceback" not in text and ".py" not in text and "0x" not in text
