"""Where a decode step's time goes: its programs one after the other, and the operations inside them.

    python benchmarks/step_programs.py --rows 16 --context 400

First the step as served, where host and device overlap. Then each program is waited for. Times of operations come from
the profiler, summed over the threads that compute; a loop contains the operations of its body.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.inbox import Inbox
from jaxserve.engine.load import load_core
from jaxserve.engine.programs import ProgramSet
from jaxserve.types import PAGE_TOKENS, Request, SamplingParams, Submit

THUNK = re.compile(r"(while|ffi_call|[a-z_-]*(?:fusion|dot|copy|scatter|gather|reduce|wrapped)[a-z_-]*)(\.\d+)?$")
"""XLA's names for operations on a CPU; `ffi_call` are the kernels of pallas_kernels/native."""


def decoding(config: EngineConfig, rows: int, context: int) -> EngineCore:
    """An engine in which `rows` sequences of `context` tokens have begun to decode."""
    inbox = Inbox()
    core = load_core(config, inbox, lambda _: None, print)
    params = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True, seed=0)
    draw, vocab = np.random.default_rng(0), core.ready.limits.vocab_size
    for row in range(rows):
        prompt = draw.integers(vocab // 2, vocab, context).tolist()
        inbox.put(Submit(request=Request(id=str(row), prompt=prompt, params=params)))
    for _ in range(rows * -(-context // PAGE_TOKENS) + 8):
        core.step()
    return core


@contextmanager
def clocked(times: dict[str, list[float]]) -> Iterator[None]:
    """Waits for the results of every program, and keeps how long each took (ms)."""
    plain = ProgramSet.ready

    def ready(self: ProgramSet, name: str) -> Any:
        program = plain(self, name)

        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = jax.block_until_ready(program(*args))
            times[name].append((time.perf_counter() - start) * 1e3)
            return result

        return None if program is None else call

    ProgramSet.ready = ready  # type: ignore[method-assign]
    try:
        yield
    finally:
        ProgramSet.ready = plain  # type: ignore[method-assign]


def operations(core: EngineCore, steps: int) -> dict[tuple[str, str], float]:
    """Of a step, the mean of `steps`: milliseconds by ("ms", kind of operation), and calls by ("calls", kind)."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                core.step()
        [file] = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
        for event in (event for plane in profile.planes for line in plane.lines for event in line.events):
            if kind := THUNK.match(event.name):
                found["ms", kind[1]] += event.duration_ns / 1e6 / steps
                found["calls", kind[1]] += 1 / steps
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; default: the bundled model")
    parser.add_argument("--rows", type=int, default=16, help="sequences decoding")
    parser.add_argument("--context", type=int, default=400, help="tokens a sequence")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    config = EngineConfig()
    config = replace(
        config,
        model=replace(config.model, model=args.model),
        cache=replace(config.cache, kv_cache_dtype=args.kv_cache_dtype),
        runtime=replace(config.runtime, wait_for_buckets=True),
    )
    core = decoding(config, args.rows, args.context)
    start, host = time.perf_counter(), time.thread_time()
    for _ in range(args.steps):
        core.step()
    wall, host = (time.perf_counter() - start) / args.steps, (time.thread_time() - host) / args.steps
    print(
        f"\n{args.rows} rows from {args.context} tokens on: a step takes {wall * 1e3:.2f} ms, the host {host * 1e3:.2f}"
    )
    times: dict[str, list[float]] = defaultdict(list)
    with clocked(times):
        for _ in range(args.steps):
            core.step()
    print("\n| program | calls a step | ms |\n|---|---:|---:|")
    for name, samples in times.items():
        print(f"| `{name}` | {len(samples) / args.steps:.2f} | {statistics.median(samples):.2f} |")
    found = operations(core, max(1, args.steps // 4))
    print("\n| operation | calls a step | ms |\n|---|---:|---:|")
    kinds = sorted((kind for what, kind in found if what == "ms"), key=lambda kind: -found["ms", kind])
    for kind in kinds[:12]:
        print(f"| `{kind}` | {found['calls', kind]:.0f} | {found['ms', kind]:.2f} |")
    core.close()


if __name__ == "__main__":
    main()
