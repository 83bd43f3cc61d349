"""Libraries under test, each in a process of its own that speaks the protocol of loop.py."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Library:
    """`limit`: how many of the prompts a run takes, for sides too slow for all of them. stderr goes to `log`."""

    def __init__(
        self,
        name: str,
        python: Path | str,
        script: str,
        arguments: Sequence[object],
        environment: Mapping[str, str] | None = None,
        limit: int | None = None,
    ):
        self.name = name
        self._command = [str(python), str(HERE / script), *map(str, arguments)]
        self._environment = dict(environment or {})
        self._limit = limit
        self._process: subprocess.Popen[str] | None = None
        self.shown = _shown(self._environment, script, arguments)

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self._environment},
        )
        self._result()

    def run(self, prompts: Sequence[Any], new_tokens: int) -> float:
        """Generated tokens per second.

        Raises:
            RuntimeError: the side died, or a request did not get all its tokens.
        """
        assert self._process is not None and self._process.stdin is not None
        print(
            json.dumps({"prompts": list(prompts[: self._limit]), "max_tokens": new_tokens}),
            file=self._process.stdin,
            flush=True,
        )
        result = self._result()
        if set(result["lengths"]) != {new_tokens}:
            raise RuntimeError(
                f"{self.name} stopped early: {sorted(set(result['lengths']))} instead of {new_tokens} tokens"
            )
        return sum(result["lengths"]) / result["seconds"]

    def _result(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError(f"{self.name} ended with code {self._process.wait()}")

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()


def jaxserve_library(model: Path, concurrency: int, kv_bytes: int) -> Library:
    return Library("jaxserve", sys.executable, "ours.py", [model, concurrency, kv_bytes])


def hugging_face(model: Path, batch: int, threads: int, limit: int | None) -> Library:
    name = "HF generate, one by one" if batch == 1 else f"HF generate, batches of {batch}"
    return Library(name, sys.executable, "hf.py", [model, batch, threads], {"OMP_NUM_THREADS": str(threads)}, limit)


def vllm(python: Path, model: Path, concurrency: int, threads: int) -> Library:
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    preload = [path for pattern in ("libtcmalloc_minimal.so.4", "libiomp5.so") for path in _libraries(python, pattern)]
    if preload:
        environment["LD_PRELOAD"] = ":".join(preload)
    return Library("vLLM (CPU)", python, "vllm_cpu.py", [model, concurrency], environment)


def _shown(environment: Mapping[str, str], script: str, arguments: Sequence[object]) -> str:
    """The command as a reader elsewhere would type it: paths are cut to names."""
    settings = [
        f"{name}={':'.join(Path(part).name for part in value.split(':'))}" for name, value in environment.items()
    ]
    words = [argument.name if isinstance(argument, Path) else str(argument) for argument in arguments]
    return shlex.join([*settings, "python", f"benchmarks/sides/{script}", *words])


def _libraries(python: Path, name: str) -> list[str]:
    """A library that vLLM advises to preload, where its environment or the system has it."""
    places = [python.absolute().parents[1], Path("/usr/lib")]
    return [str(path) for place in places for path in sorted(place.rglob(name))[:1]][:1]
