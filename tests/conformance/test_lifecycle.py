"""Keys, draining, and an engine that dies: servers of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import openai

from .conftest import ROOT, Server, eventually

LONG = {"prompt": "Count:", "max_tokens": 300, "ignore_eos": True, "stream": True}
KEY = {"Authorization": "Bearer secret"}


def test_keys_and_draining(start_server: Callable[..., Server]):
    server = start_server("--api-key", "secret", "other", "--admin-api-key", "root", "--metrics-compat", "vllm")
    for path in (
        "/v1/models",
        "/metrics",
        "/version",
        "/load",
        "/health_generate",
        "/openapi.json",
        "/nowhere",
        "/v1/models/",
    ):
        assert httpx.get(server.url + path).status_code == 401, path
    for path in ("/v1/completions", "/tokenize", "/reset_prefix_cache", "/abort_requests"):
        assert httpx.post(server.url + path, json={}).status_code == 401, path
    for scheme in ("Basic secret", "secret", "Bearer", "Bearer wrong", "Bearer secret secret"):
        answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": scheme})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", scheme
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="other").models.list().data
    assert "\nvllm:num_requests_running{" in httpx.get(f"{server.url}/metrics", headers=KEY).text
    assert httpx.post(f"{server.url}/reset_prefix_cache", headers=KEY).status_code == 403
    assert httpx.post(f"{server.url}/reset_prefix_cache", headers={"Authorization": "Bearer root"}).status_code == 200

    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, headers=KEY, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503, 5)
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, headers=KEY)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    reader.join(60)
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(30) == 0


def test_a_dead_engine_is_reported_and_ends_the_server(start_server: Callable[..., Server]):
    server = start_server("--drain-timeout", "1")
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "max_tokens": 1500}, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(server.engine_pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["error"]["code"] == "engine_dead"
    assert server.process.wait(30) == 1
    eventually(lambda: any("killed by signal 9" in line for line in server.lines), 5)


def refusal(executables: str, *arguments: str) -> str:
    """The last line that a server writes which cannot start."""
    command = [sys.executable, "-m", "jaxserve", "serve", "--compile-cache", executables, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_what_cannot_be_served_is_one_line(executables: str):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}" in refusal(executables, "--port", port)
    assert "/nowhere/at/all" in refusal(executables, "--port", "0", "--model", "/nowhere/at/all")


def test_a_unix_socket_that_cannot_be_had_is_one_line(executables: str, tmp_path: Path):
    assert "No such file or directory" in refusal(executables, "--uds", str(tmp_path / "missing" / "socket"))
    assert "too long" in refusal(executables, "--uds", str(tmp_path / ("long" * 50)))
    (tmp_path / "file").write_text("mine")
    assert "Address already in use" in refusal(executables, "--uds", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "socket"))
        taken.listen()
        assert "another server listens there" in refusal(executables, "--uds", str(tmp_path / "socket"))
