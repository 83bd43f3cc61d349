"""Machines and jobs for tests of the simulator."""

from __future__ import annotations

from dataclasses import replace

from msgspec import structs

from jaxserve.sim.cost import Published
from jaxserve.sim.machine import Machine, published
from jaxserve.sim.workload import Job, Trace, Turn

STEP_S = 0.01


def machine(
    kv_tokens: int = 64 * 64,
    max_num_seqs: int = 4,
    tiles: int = 4,
    lag: int = 1,
    host_kv_tokens: int = 0,
    **cost: float,
) -> Machine:
    """Every step takes 10 ms, unless `cost` changes terms of the published model."""
    small = published(
        max_model_len=min(kv_tokens, 1024),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64 * tiles,
        kv_tokens=kv_tokens,
    )
    terms = {
        "prefill_ms": 10.0,
        "prefill_token_ms": 0.0,
        "prefill_pair_ms": 0.0,
        "decode_ms": 10.0,
        "decode_row_ms": 0.0,
        "decode_context_ms": 0.0,
        **cost,
    }
    made = replace(small, cost=Published(**terms), limits=structs.replace(small.limits, lag=lag))
    return made.with_options(host_kv_tokens=host_kv_tokens) if host_kv_tokens else made


def jobs(*each: tuple[float, int, int], **fields: object) -> Trace:
    """Plain requests from (arrival, prompt, output)."""
    made = [Job(arrival=at, turns=(Turn(prompt, output),), **fields) for at, prompt, output in each]  # type: ignore[arg-type]
    return Trace("test", tuple(made))
