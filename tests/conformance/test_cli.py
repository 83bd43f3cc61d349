"""The verbs that talk to a server, against the live one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.cli import main


def test_complete_streams_what_the_server_says(server, http, capsys: pytest.CaptureFixture[str]):
    body = {"prompt": "The old man", "max_tokens": 12, "temperature": 0}
    expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert main(["complete", "The old man", "--url", server.url, "--max-tokens", "12", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    arguments = [
        "complete",
        "The old man",
        "--url",
        f"{server.url}/v1",
        "--model",
        "alias",
        "--max-tokens",
        "12",
        "--echo",
        "--temperature",
        "0",
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "The old man" + expected + "\n"


def test_a_refusal_is_one_line(server, capsys: pytest.CaptureFixture[str]):
    assert main(["complete", "x", "--url", server.url, "--model", "nobody"]) == 2
    assert main(["complete", "x", "--url", server.url, "--temperature", "-1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "nobody" in lines[0] and "temperature" in lines[1]


def chat(*arguments: str, said: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxserve", "chat", "--temperature", "0", "--max-tokens", "8", *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=120, check=False)


def test_chat_takes_one_message_from_stdin_or_the_command_line(server, http):
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "temperature": 0}
    expected = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] + "\n"
    assert chat("--url", server.url, said="Hello!").stdout == expected
    assert chat("--url", server.url, "Hello!", said="").stdout == expected


def test_ctrl_c_ends_quietly_and_cancels_the_request(server):
    command = [sys.executable, "-m", "jaxserve", "complete", "Once upon a time", "--url", server.url]
    process = subprocess.Popen([*command, "--max-tokens", "3500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, b"")
    server.wait_idle()


def test_a_conversation_has_a_memory_that_clear_wipes(
    server, http, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def answer(*said: str) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        return http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    first = answer("Hello!")
    second = answer("Hello!", first, "Tell me more.")
    lines = iter(["Hello!", "Tell me more.", "/help", "/clear", "Hello!", "/exit"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "--url", server.url, "--temperature", "0", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.splitlines() == [*f"{first}\n{second}\n{first}".splitlines()]


def test_bench_serve_counts_every_token(server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    figures = tmp_path / "figures.json"
    arguments = [
        "bench",
        "serve",
        "--url",
        server.url,
        "--clients",
        "4",
        "--num-prompts",
        "6",
        "--input-len",
        "5:40",
        "--output-len",
        "7",
        "--warmup",
        "1",
        "--json",
        str(figures),
    ]
    assert main(arguments) == 0
    found = json.loads(figures.read_text())
    assert (found["requests"], found["new_tokens"]) == (6, 42)
    assert 0 < found["ttft_p50_ms"] <= found["latency_p99_ms"]
    assert "new_tokens_per_s" in capsys.readouterr().out


def test_bench_serve_replays_a_trace(server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    figures = tmp_path / "figures.json"
    spec = "agents:jobs=4,prompt=uniform/5/30,output=uniform/2/6,turns=3,prefix=130,think_s=0.01"
    options = ["--num-prompts", "12", "--rate", "20", "--programs", "--json", str(figures)]
    assert main(["bench", "serve", "--url", server.url, "--trace", spec, *options]) == 0
    found = json.loads(figures.read_text())
    assert (found["requests"], found["finished"]) == (12, 12)
    assert found["prefix_hit_tokens"] >= 8 * 128
    assert found["jct_mean_s"] > found["latency_mean_s"] > found["ttft_mean_s"] > 0
    assert "tbt_p99_s" in capsys.readouterr().out


def test_batch_through_the_server(server, http, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [{"prompt": f"Number {i}", "max_tokens": 3, "temperature": 0} for i in range(100)]
    bodies[3]["top_p"] = 7
    source.write_text(
        "".join(
            json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
            for i, body in enumerate(bodies)
        )
    )
    # More requests than the server's queue takes: refusals with 503 are asked again.
    assert main(["batch", "-i", str(source), "-o", str(target), "--url", server.url, "--concurrency", "100"]) == 0
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer["custom_id"] for answer in found] == [str(i) for i in range(100)]
    assert [answer["response"]["status_code"] for answer in found] == [400 if i == 3 else 200 for i in range(100)]
    expected = http.post("/v1/completions", json=bodies[50]).json()["choices"][0]["text"]
    assert found[50]["response"]["body"]["choices"][0]["text"] == expected
    assert capsys.readouterr().err.endswith("; 1 errors\n")
