"""Traces by name or from files: one reader a format, small samples of each with the package, generators.

A file's format is recognised by its first line. Files may be gzipped.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import ModuleType

import msgspec

from jaxserve.sim.traces import azure, burstgpt, claude_code, exgentic, lengths, lmcache, mooncake, servegen, taubench
from jaxserve.sim.traces.synthetic import PRESETS, generate, specified
from jaxserve.sim.workload import Job, Trace

READERS: tuple[ModuleType, ...] = (
    azure,
    burstgpt,
    claude_code,
    exgentic,
    lengths,
    lmcache,
    mooncake,
    servegen,
    taubench,
)
"""Each has `matches(first line) -> bool` and `read(lines) -> Iterator[Job]`."""

SAMPLES = {
    "azure-conv": ("azure_2023_conv.csv.gz", "Azure 2023, conversation service: bursty arrivals, medium prompts"),
    "azure-code": ("azure_2023_code.csv.gz", "Azure 2023, code service: long prompts, short answers, strong bursts"),
    "azure-2024": ("azure_2024_conv.csv.gz", "Azure 2024, conversation service over a day, thinned"),
    "burstgpt": ("burstgpt_head.csv.gz", "BurstGPT: campus use of ChatGPT and GPT-4 (its first rows)"),
    "arxiv": ("arxiv_lengths.csv.gz", "arXiv summarisation: long prompts; no arrival times"),
    "mooncake": ("mooncake_conversation.jsonl.gz", "Mooncake (Kimi): very long prompts with shared prefixes"),
    "servegen": ("servegen_m_small.jsonl.gz", "ServeGen: generated from one client of a production service"),
    "swe-agent": ("exgentic_swebench.jsonl.gz", "SWE-bench agents: sessions of growing prompts and tool times"),
    "claude-code": ("claude_code_turns.jsonl.gz", "coding-agent sessions: very long contexts; no arrival times"),
    "lmcache": ("lmcache_taubench.jsonl.gz", "LMCache's tau-bench sessions, measured from their text"),
    "tau-bench": ("taubench_airline.jsonl.gz", "tau-bench airline dialogues with tools; no times"),
}
"""File of the package and description, by name."""


def names() -> tuple[str, ...]:
    return (*SAMPLES, *PRESETS)


def descriptions() -> dict[str, str]:
    return {name: text for name, (_, text) in (*SAMPLES.items(), *PRESETS.items())}


def load(spec: str) -> Trace:
    """The trace that `spec` names: a sample, a generator with changes (`heavy-tail:jobs=500,turns=uniform/1/4`), or a
    file.

    Raises:
        ValueError: none of these, or a file that no reader understands.
        OSError: the file cannot be read.
    """
    name, _, rest = spec.partition(":")
    if name in PRESETS:
        changes = dict(part.partition("=")[::2] for part in rest.split(",")) if rest else {}
        return Trace(spec, tuple(generate(specified(name, changes))))
    if spec in SAMPLES:
        file = resources.files(__package__) / "data" / SAMPLES[spec][0]
        return _read(spec, file.read_bytes())
    path = Path(spec).expanduser()
    if not path.exists():
        raise ValueError(f"there is no trace or file {spec!r}; the traces are {', '.join(names())}")
    return _read(path.name, path.read_bytes())


def _read(name: str, data: bytes) -> Trace:
    text = io.TextIOWrapper(io.BytesIO(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data), "utf-8")
    head = text.readline()
    text.seek(0)
    reader = next((reader for reader in READERS if reader.matches(head)), None)
    if reader is None:
        formats = ", ".join(module.__name__.rpartition(".")[2] for module in READERS)
        raise ValueError(f"{name}: no reader understands a file that begins {head[:60]!r} (formats: {formats})")
    lines: Iterator[str] = (line for line in text if line.strip())
    try:
        jobs: list[Job] = list(reader.read(lines))
    except (KeyError, ValueError, msgspec.MsgspecError) as error:
        raise ValueError(f"{name} is not what its first line promises: {type(error).__name__}: {error}") from None
    jobs.sort(key=lambda job: job.arrival)
    return Trace(name, tuple(jobs))
