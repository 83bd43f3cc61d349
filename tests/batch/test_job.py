"""What a line asks, and what is wrong with it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.batch.job import Job, read_job, refused
from jaxserve.batch.lines import Line

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def job_of(data: bytes | None) -> Job:
    return read_job(Line(7, 99, data))


def line(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        line(),
        line() + b"\r",
        b"\xef\xbb\xbf" + line(),
        b"  " + line(),
        line(url="/v1/chat/completions"),
        line(body={"stream": False}),
        line(extra=1),
    ],
)
def test_good_lines(data: bytes):
    job = job_of(data)
    assert job.problem is None
    assert (job.custom_id, job.number, job.end) == ("a", 7, 99)
    assert isinstance(job.body, dict)


@pytest.mark.parametrize(
    "data, code",
    [
        (b"", "invalid_json_line"),
        (b" \r", "invalid_json_line"),
        (b"\xef\xbb\xbf", "invalid_json_line"),
        (b"{", "invalid_json_line"),
        (b"[]", "invalid_json_line"),
        (b"null", "invalid_json_line"),
        (b"\xff\xfe", "invalid_json_line"),
        (b'{"custom_id": "\xff"}', "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (None, "line_too_long"),
        (line(custom_id=None), "missing_required_parameter"),
        (line(custom_id=""), "missing_required_parameter"),
        (line(custom_id=5), "missing_required_parameter"),
        (line(method="GET"), "invalid_method"),
        (line(method=None), "invalid_method"),
        (line(url="/v1/embeddings"), "invalid_url"),
        (line(url=["/v1/completions"]), "invalid_url"),
        (line(url={}), "invalid_url"),
        (line(body=None), "missing_required_parameter"),
        (line(body=[1]), "missing_required_parameter"),
        (line(body={"stream": True}), "invalid_request"),
    ],
)
def test_bad_lines(data: bytes | None, code: str):
    job = job_of(data)
    assert job.problem is not None
    assert job.problem.code == code


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*GOOD, "x"]), inner),
    )
    .map(json.dumps)
    .map(str.encode)
)
def test_no_line_raises_and_every_refusal_is_one_line_of_json(data: bytes):
    job = job_of(data.replace(b"\n", b""))
    if job.problem is not None:
        written = refused(job)
        assert written.count(b"\n") == 1 and written.endswith(b"\n")
        answer = json.loads(written)
        assert answer["response"] is None and answer["error"]["code"] and answer["custom_id"] == job.custom_id
