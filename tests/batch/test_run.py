"""A job from file to file. Answers come from a coroutine that echoes its line: test_end_to_end.py has an engine."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.batch.job import Answer
from jaxserve.batch.progress import Progress
from jaxserve.batch.run import JobFailed, run_job
from jaxserve.config import ConfigError


class Echo:
    """Answers with the body, late and out of order. Fails the job after `lifetime` answers."""

    def __init__(self, seed: int = 0, lifetime: int | None = None):
        self.draw = random.Random(seed)
        self.lifetime = lifetime
        self.running = 0
        self.most_running = 0
        self.asked: list[int] = []

    async def __call__(self, url: str, body: dict[str, Any], number: int) -> Answer:
        self.asked.append(number)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        for _ in range(self.draw.randrange(4)):
            await asyncio.sleep(0)
        self.running -= 1
        if self.lifetime is not None:
            self.lifetime -= 1
            if self.lifetime < 0:
                raise JobFailed("enough")
        return Answer(
            200, {"id": f"x-{number}", "url": url, "echo": body, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
        )


def request(custom_id: str, **body: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}).encode()


def run(source: Path, target: Path, answer: Echo | None = None, window: int = 8) -> Progress:
    return asyncio.run(run_job(source, target, answer or Echo(), window, progress=False))


def job_file(folder: Path, count: int) -> Path:
    path = folder / "in.jsonl"
    path.write_bytes(b"".join(request(f"r{i}", prompt=f"text {i}") + b"\n" for i in range(count)))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_answers_come_in_the_order_of_the_input(tmp_path: Path):
    source, target = job_file(tmp_path, 100), tmp_path / "out.jsonl"
    counts = run(source, target)
    found = answers(target)
    assert [a["custom_id"] for a in found] == [f"r{i}" for i in range(100)]
    assert [a["response"]["body"]["echo"]["prompt"] for a in found] == [f"text {i}" for i in range(100)]
    assert all(a["error"] is None and a["response"]["status_code"] == 200 for a in found)
    assert len({a["id"] for a in found}) == 100
    assert (counts.lines, counts.errors, counts.new_tokens, counts.prompt_tokens) == (100, 0, 200, 100)
    assert not (tmp_path / "out.jsonl.position").exists()


def test_never_more_lines_in_work_than_the_window(tmp_path: Path):
    echo = Echo()
    run(job_file(tmp_path, 200), tmp_path / "out.jsonl", echo, window=5)
    assert 2 <= echo.most_running <= 5


def test_bad_lines_become_errors_at_their_place(tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b"\n".join(
            [
                b"\xef\xbb\xbf" + request("a"),
                b"",
                b"{oops",
                request("b") + b"\r",
                request("a"),
                request("c", stream=True),
                request("d"),
            ]
        )
    )
    counts = run(source, target)
    found = answers(target)
    assert [(a["custom_id"], a["error"] and a["error"]["code"]) for a in found] == [
        ("a", None),
        (None, "invalid_json_line"),
        (None, "invalid_json_line"),
        ("b", None),
        ("a", "duplicate_custom_id"),
        ("c", "invalid_request"),
        ("d", None),
    ]
    assert counts.errors == 4


def test_an_id_stays_used_across_a_resume(tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(request("a") + b"\n")
    run(source, target)
    source.write_bytes(request("a") + b"\n" + request("a") + b"\n")
    run(source, target)
    assert [a["error"] and a["error"]["code"] for a in answers(target)] == [None, "duplicate_custom_id"]


BAD = b'{"custom_id": "same", "method": "GET"}'
mixed_lines = st.lists(st.sampled_from([b"", b"{", b"[]", None, None, None, b"dup", BAD]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(mixed_lines, st.integers(1, 5), st.data())
def test_a_job_cut_anywhere_goes_on_to_the_same_output(tmp_path_factory, kinds, window: int, data: st.DataObject):
    folder = tmp_path_factory.mktemp("job")
    source, whole, cut = folder / "in.jsonl", folder / "whole.jsonl", folder / "cut.jsonl"
    lines = [
        request(f"r{i}", n=i) if kind is None else request("same") if kind == b"dup" else kind
        for i, kind in enumerate(kinds)
    ]
    source.write_bytes(b"".join(line + b"\n" for line in lines))
    run(source, whole, window=window)
    length = data.draw(st.integers(0, whole.stat().st_size))
    cut.write_bytes(whole.read_bytes()[:length])
    echo = Echo(seed=length)
    run(source, cut, echo, window=data.draw(st.integers(1, 5)))
    assert cut.read_bytes() == whole.read_bytes()
    kept = whole.read_bytes()[:length].count(b"\n")
    assert all(number > kept for number in echo.asked), "a line that was answered is not asked again"


def test_a_job_that_fails_keeps_what_is_written_and_goes_on(tmp_path: Path):
    source, target = job_file(tmp_path, 300), tmp_path / "out.jsonl"
    rounds = 0
    while True:
        rounds += 1
        try:
            run(source, target, Echo(seed=rounds, lifetime=70))
            break
        except JobFailed:
            continue
    assert rounds == 5
    assert [a["custom_id"] for a in answers(target)] == [f"r{i}" for i in range(300)]


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"{}",
        b"[]",
        b'{"line": 3, "offset": 11}',
        b'{"line": 900, "offset": 0}',
        b'{"line": "x", "offset": null}',
        b'{"line": 0, "offset": 1000000}',
    ],
)
def test_a_useless_position_file_does_no_harm(tmp_path: Path, state: bytes):
    source, target = job_file(tmp_path, 20), tmp_path / "out.jsonl"
    run(source, target)
    expected = target.read_bytes()
    target.write_bytes(b"".join(expected.splitlines(keepends=True)[:10]))
    (tmp_path / "out.jsonl.position").write_bytes(state)
    run(source, target)
    assert target.read_bytes() == expected


def test_a_finished_job_is_left_alone(tmp_path: Path):
    source, target = job_file(tmp_path, 10), tmp_path / "out.jsonl"
    run(source, target)
    before = target.read_bytes()
    echo = Echo()
    run(source, target, echo)
    assert target.read_bytes() == before and not echo.asked


def test_an_empty_input_gives_an_empty_output(tmp_path: Path):
    source, target = job_file(tmp_path, 0), tmp_path / "out.jsonl"
    assert run(source, target).lines == 0
    assert target.read_bytes() == b""


def refusal(source: Path, target: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        run(source, target)
    return str(caught.value)


def test_paths_that_cannot_be_used(tmp_path: Path):
    source = job_file(tmp_path, 3)
    (tmp_path / "link.jsonl").symlink_to(source)
    before = source.read_bytes()
    assert "same file" in refusal(source, source)
    assert "same file" in refusal(source, tmp_path / "link.jsonl")
    assert "does not exist" in refusal(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    assert "does not exist" in refusal(source, tmp_path / "none" / "out.jsonl")
    assert "folder" in refusal(source, tmp_path)
    assert "not a file" in refusal(tmp_path, tmp_path / "out.jsonl")
    assert source.read_bytes() == before


def test_an_output_of_something_else_is_not_touched(tmp_path: Path):
    source, target = job_file(tmp_path, 3), tmp_path / "out.jsonl"
    target.write_bytes(b"precious notes\n")
    assert "something else" in refusal(source, target)
    target.write_bytes(b'{"id": "1", "custom_id": "other", "response": null, "error": null}\n')
    assert "does not answer line 1" in refusal(source, target)
    target.write_bytes(b"".join(b'{"custom_id": "r%d"}\n' % i for i in range(4)))
    assert "does not answer line 4" in refusal(source, target)


def test_two_jobs_do_not_share_an_output(tmp_path: Path):
    source, target = job_file(tmp_path, 3), tmp_path / "out.jsonl"

    async def nested(url: str, body: dict[str, Any], number: int) -> Answer:
        with pytest.raises(ConfigError, match="another job"):
            await run_job(source, target, Echo(), 8, progress=False)
        return Answer(200, {})

    asyncio.run(run_job(source, target, nested, 8, progress=False))
    assert len(answers(target)) == 3
