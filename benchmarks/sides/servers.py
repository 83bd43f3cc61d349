"""Servers under test, each on a port of its own, measured by the same streaming clients."""

from __future__ import annotations

import asyncio
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.cli.load import Prompt, Shot, measure

START_S = 300.0


class Server:
    """`fields` are what the side needs in a request's body besides prompt and length."""

    def __init__(self, name: str, command: Sequence[object], clients: int, fields: dict[str, Any], shown: str):
        self.name = name
        self._port = _free_port()
        self._command = [*map(str, command), "--port", str(self._port)]
        self._clients = clients
        self._fields = fields
        self._process: subprocess.Popen[bytes] | None = None
        self.shown = shown
        self.shots: list[Shot] = []
        """Of the last run."""

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"{self.name} ended with code {self._process.returncode}: {shlex.join(self._command)}"
                )
            try:
                if urllib.request.urlopen(f"{self._base}/health", timeout=5).status == 200:
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"{self.name} is not ready after {START_S:.0f} s")

    @property
    def _base(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def run(self, prompts: Sequence[Prompt], new_tokens: int) -> float:
        """Generated tokens per second over the whole run; with one client, of the decode phase only (1 / its TPOT).

        Raises:
            RuntimeError: a request did not get all its tokens.
        """
        fields = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, **self._fields}
        self.shots = asyncio.run(measure(self._base, prompts, self._clients, fields))
        lengths = {shot.new_tokens for shot in self.shots}
        if lengths != {new_tokens}:
            raise RuntimeError(f"{self.name} stopped early: {sorted(lengths)} instead of {new_tokens} tokens")
        if self._clients == 1:
            return sum(s.new_tokens - 1 for s in self.shots) / sum(s.last - s.first for s in self.shots)
        elapsed = max(shot.last for shot in self.shots) - min(shot.sent for shot in self.shots)
        return new_tokens * len(self.shots) / elapsed

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()


def jaxserve_server(model: Path, clients: int, slots: int, kv_bytes: int) -> Server:
    options = f"--max-num-seqs {slots} --kv-cache-memory {kv_bytes} --dtype float32 --no-enable-prefix-caching"
    command = [sys.executable, "-m", "jaxserve", "serve", "--model", model, *options.split(), "--wait-for-buckets"]
    return Server(
        "jaxserve serve", command, clients, {}, f"jaxserve serve --model {model.name} {options} --wait-for-buckets"
    )


def llama_server(binary: Path, model: Path, clients: int, slots: int, threads: int) -> Server:
    # -c is shared by the slots; flash attention would cast keys and values to f16 even with -ctk f32.
    options = (
        f"-np {slots} -c {slots * 1024} -t {threads} -tb {threads} -fa off -ctk f32 -ctv f32 --cache-ram 0 --no-webui"
    )
    command = [binary, "-m", model, *options.split()]
    return Server(
        f"llama-server -t {threads}",
        command,
        clients,
        {"cache_prompt": False},
        f"llama-server -m {model.name} {options}",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
