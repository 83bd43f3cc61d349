"""`jaxserve batch` with its own engine: killed with -9 half-way, run again, compared with an uninterrupted run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LINES = 120


def command(source: Path, target: Path, executables: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "jaxserve",
        "batch",
        "-i",
        str(source),
        "-o",
        str(target),
        "--device",
        "cpu",
        "--compile-cache",
        executables,
        "--max-num-seqs",
        "16",
        "--decode-buckets",
        "16",
        "--tile-buckets",
        "4",
        "--max-num-batched-tokens",
        "256",
        "--kv-cache-memory",
        "32MiB",
        "--batch-invariant",
        "--window",
        "50",
    ]


def write_job(path: Path) -> None:
    """Greedy and sampled, chats and completions, and every kind of line that cannot be run."""
    lines: list[str] = []
    for i in range(LINES):
        body: dict[str, Any] = {"prompt": f"The {i}th day was", "max_tokens": 4 + i % 13, "temperature": i % 3 / 2}
        url = "/v1/completions"
        if i % 4 == 1:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            url = "/v1/chat/completions"
        lines.append(json.dumps({"custom_id": f"line-{i}", "method": "POST", "url": url, "body": body}))
    lines[7] = json.dumps(
        {"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "temperature": -1}}
    )
    lines[40] = "not json"
    lines[80] = lines[79]
    path.write_text("\n".join(lines))


def texts(path: Path) -> list[Any]:
    """What does not change from run to run: everything but ids and times."""
    found = []
    for line in path.read_text().splitlines():
        answer = json.loads(line)
        response = answer["response"]
        found.append(
            (
                answer["custom_id"],
                answer["error"],
                response and response["status_code"],
                response and (response["body"].get("choices") or response["body"]["error"]),
            )
        )
    return found


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, executables: str):
    source, whole, cut = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write_job(source)
    process = subprocess.Popen(command(source, cut, executables), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while whole_lines(cut) < 15 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    at_kill = whole_lines(cut)
    assert 15 <= at_kill < LINES, "killed half-way"
    with open(cut, "ab") as file:
        file.write(b'{"id":"batch_req_99","custom_id":"torn')

    resumed = subprocess.run(command(source, cut, executables), capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    uninterrupted = subprocess.run(command(source, whole, executables), capture_output=True, text=True, check=False)
    assert uninterrupted.returncode == 0, uninterrupted.stderr

    assert f"{LINES} lines ({at_kill} of them by earlier runs)" in resumed.stderr
    assert uninterrupted.stderr.strip().splitlines()[-1].endswith("; 3 errors")
    answers = texts(whole)
    assert texts(cut) == answers
    assert [answer[0] for answer in answers[:6]] == [f"line-{i}" for i in range(6)]
    assert answers[7][2] == 400 and answers[7][3]["param"] == "temperature"
    assert answers[40][1]["code"] == "invalid_json_line"
    assert answers[80][1]["code"] == "duplicate_custom_id"
    assert sum(answer[2] == 200 for answer in answers) == LINES - 3
