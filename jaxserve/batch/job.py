"""One line of a batch file: what it asks, or why it cannot be run; and the line that answers it. No engine, no HTTP.

The forms are OpenAI's: `{"custom_id", "method": "POST", "url", "body"}` in, `{"id", "custom_id", "response":
{"status_code", "request_id", "body"} | null, "error": {"code", "message"} | null}` out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.batch.lines import Line

URLS = ("/v1/chat/completions", "/v1/completions")

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Problem:
    """Why a line has no answer. `code` is OpenAI's where it has one."""

    code: str
    message: str


@dataclass(frozen=True)
class Job:
    """A request, or what is wrong with its line. `number` and `end` are the line's."""

    number: int
    end: int
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] | None = None
    problem: Problem | None = None


@dataclass(frozen=True)
class Answer:
    """What a server would have said to a body."""

    status: int
    body: dict[str, Any]

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt and generated tokens."""
        usage = self.body.get("usage") or {}
        return usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0


def read_job(line: Line) -> Job:
    """The job of a line. Never raises: what is wrong goes into `problem`. Byte order marks and CRs are forgiven."""
    custom_id: str | None = None
    try:
        value = _decode(line)
        custom_id = _custom_id(value)
        return Job(line.number, line.end, custom_id, *_request(value))
    except _Bad as bad:
        return Job(line.number, line.end, custom_id, problem=bad.problem)


class _Bad(Exception):
    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.problem = Problem(code, message)


def _decode(line: Line) -> dict[str, Any]:
    if line.data is None:
        raise _Bad("line_too_long", "The line is longer than a request may be.")
    text = line.data.removeprefix(BOM)
    if not text.strip():
        raise _Bad("invalid_json_line", "The line is blank.")
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Bad("invalid_json_line", f"The line is not JSON: {error}.") from None
    except RecursionError:
        raise _Bad("invalid_json_line", "The line is nested too deeply.") from None
    if not isinstance(value, dict):
        raise _Bad("invalid_json_line", "The line is not a JSON object.")
    return value


def _custom_id(value: dict[str, Any]) -> str:
    found = value.get("custom_id")
    if not isinstance(found, str) or not found:
        raise _Bad("missing_required_parameter", "custom_id must be a text that is not empty.")
    return found


def _request(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if value.get("method") != "POST":
        raise _Bad("invalid_method", f"method is {value.get('method')!r}; only 'POST' can be run.")
    url, body = value.get("url"), value.get("body")
    if url not in URLS:
        raise _Bad("invalid_url", f"url is {url!r}; use {' or '.join(URLS)}.")
    if not isinstance(body, dict):
        raise _Bad("missing_required_parameter", "body must be an object.")
    if body.get("stream"):
        raise _Bad("invalid_request", "A batch line cannot stream; leave `stream` out.")
    return url, body


def answered(job: Job, answer: Answer) -> bytes:
    """The output line, with its line feed."""
    response = {"status_code": answer.status, "request_id": answer.body.get("id", ""), "body": answer.body}
    return _encode(job, response, None)


def refused(job: Job) -> bytes:
    """The output line of a job that cannot be run, with its line feed."""
    problem = job.problem or Problem("invalid_request", "The line asks nothing.")
    return _encode(job, None, {"code": problem.code, "message": problem.message, "line": job.number})


def _encode(job: Job, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    value = {"id": f"batch_req_{job.number}", "custom_id": job.custom_id, "response": response, "error": error}
    return msgspec.json.encode(value) + b"\n"
