"""One live server for the whole run: the bundled model behind `jaxserve serve` on a free port, driven as clients do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--max-num-seqs",
    "16",
    "--max-num-batched-tokens",
    "256",
    "--max-queued-requests",
    "48",
    "--kv-cache-memory",
    "64MiB",
    "--decode-buckets",
    "16",
    "--tile-buckets",
    "4",
    "--device",
    "cpu",
    "--batch-invariant",
    "--served-model-name",
    "small",
    "alias",
)


class Server:
    """A server process and what its clients may know of it."""

    def __init__(self, executables: str, *arguments: str):
        self.lines: list[str] = []
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        command = [
            sys.executable,
            "-m",
            "jaxserve",
            "serve",
            "--port",
            "0",
            "--compile-cache",
            executables,
            *SMALL,
            *arguments,
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=tempfile.gettempdir(),
        )
        self._address = threading.Event()
        self.url = ""
        threading.Thread(target=self._read, daemon=True).start()
        if not self._address.wait(180) or not self.url:
            self.process.kill()
            raise RuntimeError("the server did not start:\n" + "\n".join(self.lines))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found and not self.url:
                self.url = found[0]
                self._address.set()
        self._address.set()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (engine,) = (int(child) for child in children)
        return engine

    def metrics(self, **headers: str) -> dict[str, float]:
        """Values of metrics that have no labels of their own, without the prefix."""
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=30).text
        samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
        return {s.name.removeprefix("jaxserve:"): s.value for s in samples if set(s.labels) == {"model_name", "engine"}}

    def wait_idle(self, timeout: float = 30.0) -> dict[str, float]:
        """Waits until no sequence runs or waits and no page is held; returns the metrics of then."""

        def idle() -> dict[str, float] | None:
            now = self.metrics()
            busy = now["num_requests_running"] + now["num_requests_waiting"] + now["kv_cache_usage_perc"]
            return None if busy else now

        return eventually(idle, timeout)

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


def eventually(found: Callable[[], object], timeout: float = 30.0):
    """Polls until `found` returns something true, and returns that."""
    end = time.monotonic() + timeout
    while not (result := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} s")
        time.sleep(0.02)
    return result


@pytest.fixture
def start_server(executables: str) -> Iterator[Callable[..., Server]]:
    """Starts servers that are gone after the test, whatever happens in it."""
    started: list[Server] = []

    def start(*arguments: str) -> Server:
        started.append(Server(executables, *arguments))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


@pytest.fixture(scope="session")
def server(executables: str) -> Iterator[Server]:
    started = Server(executables)
    yield started
    code = started.stop()
    assert code == 0, "\n".join(started.lines)


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


KNOWN = {"prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="session")
def known_answer(http: httpx.Client) -> list[dict]:
    return http.post("/v1/completions", json=KNOWN).json()["choices"]


@pytest.fixture
def unharmed(server: Server, http: httpx.Client, known_answer: list[dict]) -> Iterator[None]:
    """After the test: the server answers a known request as before, holds no page and has compiled nothing new."""
    yield
    assert server.process.poll() is None
    after = http.post("/v1/completions", json=KNOWN)
    assert after.status_code == 200
    assert after.json()["choices"] == known_answer
    assert server.wait_idle()["undeclared_compilations_total"] == 0
