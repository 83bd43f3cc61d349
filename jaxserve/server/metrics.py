"""Prometheus metrics under vLLM's names: what this process observes of requests, and what the engine reports.

Everything is observed on the event loop's thread, so the histograms need no locks: observing one costs a bisection.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from math import inf
from time import monotonic

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.samples import Sample

from jaxserve.text.processor import RequestDelta, RequestState
from jaxserve.types import Stats

PREFIX = "jaxserve:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_TOKEN_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_REQUEST_S = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
)
_TOKENS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))
_CHOICES = (1, 2, 5, 10, 20, 50, 100)


class Histogram:
    """Counts of values by upper bound."""

    def __init__(self, help: str, bounds: Iterable[float]):
        self.help = help
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def family(self, name: str, labels: Mapping[str, str]) -> HistogramMetricFamily:
        edges = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        family = HistogramMetricFamily(name, self.help, labels=list(labels))
        family.add_metric(list(labels.values()), list(zip(edges, accumulate(self.counts), strict=True)), self.sum)
        return family


class Metrics:
    """What a server has seen since it started."""

    def __init__(self, model_name: str, compat: str | None = None):
        """`compat`: also export every metric under this prefix (`vllm`)."""
        self._labels = {"model_name": model_name, "engine": "0"}
        self._prefixes = (PREFIX, f"{compat}:") if compat else (PREFIX,)
        self.time_to_first_token = Histogram("Time from arrival to the first token (streams).", _TTFT_S)
        self.inter_token = Histogram("Time between deliveries of tokens of a choice (streams).", _TOKEN_S)
        self.per_output_token = Histogram("Mean time per token after the first (streams).", _TOKEN_S)
        self.e2e = Histogram("Time from arrival to the last token.", _REQUEST_S)
        self.queue = Histogram("Time from arrival to the first step that computed for the request.", _REQUEST_S)
        self.prefill = Histogram("Time from that step to the first token (streams).", _REQUEST_S)
        self.decode = Histogram("Time from the first token to the last (streams).", _REQUEST_S)
        self.prompt_tokens = Histogram("Tokens in prompts.", _TOKENS)
        self.generation_tokens = Histogram("Tokens generated, by request.", _TOKENS)
        self.max_tokens = Histogram("Tokens asked for at most, by request.", _TOKENS)
        self.choices = Histogram("Choices asked for, by request.", _CHOICES)
        self.finished: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()

    def _histograms(self) -> dict[str, Histogram]:
        return {
            "time_to_first_token_seconds": self.time_to_first_token,
            "inter_token_latency_seconds": self.inter_token,
            "request_time_per_output_token_seconds": self.per_output_token,
            "e2e_request_latency_seconds": self.e2e,
            "request_queue_time_seconds": self.queue,
            "request_prefill_time_seconds": self.prefill,
            "request_decode_time_seconds": self.decode,
            "request_prompt_tokens": self.prompt_tokens,
            "request_generation_tokens": self.generation_tokens,
            "request_params_max_tokens": self.max_tokens,
            "request_params_n": self.choices,
        }

    def render(self, engine: Stats | None) -> bytes:
        """The text exposition format. `engine` None: the engine is gone, only this process's numbers are left."""
        families: list[Metric] = [one.family(name, self._labels) for name, one in self._histograms().items()]
        families.append(self._counter("request_success", "Choices that ended.", "finished_reason", self.finished))
        families.append(
            self._counter(
                "admission_rejections", "Requests refused by a full or closing server.", "reason", self.rejected
            )
        )
        if engine is not None:
            families += engine_families(engine, self._labels)
        return generate_latest(_Prefixed(families, self._prefixes))

    def _counter(self, name: str, help: str, label: str, counts: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(name, help, labels=[*self._labels, label])
        for value, count in sorted(counts.items()):
            family.add_metric([*self._labels.values(), value], count)
        return family


class RequestWatch:
    """Tells the metrics how one prompt's request goes. Times between tokens are of requests that stream."""

    __slots__ = ("_metrics", "_state", "_last", "_open")

    def __init__(self, metrics: Metrics, state: RequestState):
        params = state.request.params
        self._metrics = metrics
        self._state = state
        self._last: dict[int, float] = {}
        self._open = params.n
        metrics.prompt_tokens.observe(len(state.request.prompt))
        metrics.choices.observe(params.n)
        metrics.max_tokens.observe(params.max_tokens or 0)

    def saw(self, delta: RequestDelta) -> None:
        now = monotonic()
        metrics, last = self._metrics, self._last
        if self._state.request.stream:
            if not last:
                metrics.time_to_first_token.observe(now - self._state.metrics["arrival_time"])
            for choice in delta.choices:
                if choice.index in last:
                    metrics.inter_token.observe(now - last[choice.index])
                last[choice.index] = now
        for choice in delta.choices:
            if choice.finish_reason is not None:
                metrics.finished[choice.finish_reason] += 1
                self._open -= 1
        if delta.finished:
            self._finished()

    def ended(self) -> None:
        """Nobody looks any more: choices that had not ended were aborted."""
        self._metrics.finished["abort"] += self._open
        self._open = 0

    def _finished(self) -> None:
        metrics, state = self._metrics, self._state
        arrived, first = state.metrics["arrival_time"], state.metrics.get("first_token_time")
        ended = state.metrics.get("finished_time")
        if first is None or ended is None:
            return
        queued, generated = state.metrics.get("queued_s", 0.0), state.generated
        metrics.e2e.observe(ended - arrived)
        metrics.queue.observe(queued)
        metrics.generation_tokens.observe(generated)
        if state.request.stream:
            metrics.prefill.observe(max(0.0, first - arrived - queued))
            metrics.decode.observe(ended - first)
            if generated > 1:
                metrics.per_output_token.observe((ended - first) / (generated - 1))


class _Prefixed:
    """Families under each of several prefixes, as a collector that `generate_latest` takes."""

    def __init__(self, families: Iterable[Metric], prefixes: Iterable[str]):
        self._families = list(families)
        self._prefixes = tuple(prefixes)

    def collect(self) -> Iterator[Metric]:
        for prefix in self._prefixes:
            for family in self._families:
                renamed = Metric(prefix + family.name, family.documentation, family.type)
                renamed.samples = [Sample(prefix + s.name, s.labels, s.value) for s in family.samples]
                yield renamed


HELP = {
    "num_requests_running": "Sequences that hold a slot of the engine.",
    "num_requests_waiting": "Sequences that wait for a slot.",
    "kv_cache_usage_perc": "Share of KV pages in use; 1 is all.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "swap_out_bytes": "Bytes of KV sent to host memory.",
    "swap_in_bytes": "Bytes of KV fetched from host memory.",
    "swap_out_moves": "Moves of KV pages to host memory.",
    "swap_in_moves": "Moves of KV pages from host memory.",
    "swap_copies": "Copies that these moves took.",
    "swap_pages_still_valid": "Pages that needed no copy to host memory, because theirs was still valid.",
    "swap_usage_perc": "Share of the host memory for KV that is in use; 1 is all.",
    "policy_errors": "Times the scheduling policy failed; arrival order took its place for a step.",
    "program_tokens_reused": "Prompt tokens whose KV a program held from its last turn.",
    "num_programs_pinned": "Programs that hold KV pages between two turns.",
    "num_preemptions": "Times a sequence lost its place to another.",
    "prompt_tokens": "Tokens of prompts that were admitted.",
    "prompt_tokens_cached": "Prompt tokens whose KV came from the prefix cache.",
    "generation_tokens": "Tokens generated.",
    "iteration_tokens_total": "Tokens computed in a step.",
    "spec_decode_num_drafts": "Times tokens were proposed.",
    "spec_decode_num_draft_tokens": "Tokens proposed.",
    "spec_decode_num_accepted_tokens": "Proposed tokens that were accepted.",
    "corrupted_requests": "Requests that ended because their logits were not finite.",
    "steps": "Steps of the engine.",
    "prefill_tokens": "Prompt tokens computed, again after preemptions too.",
    "prefill_padding_tokens": "Places in prefill tiles that held no token.",
    "decode_rows": "Decode rows computed.",
    "padded_tokens": "Places in steps that held no token.",
    "undeclared_compilations": "Programs compiled outside the declared set; more than 0 is a bug.",
    "programs_compiled": "Declared programs compiled since the start.",
    "programs_loaded": "Declared programs loaded from the cache.",
    "programs_pending": "Declared programs still to be compiled in the background.",
}
_KEY = re.compile(r'(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<label>\w+)="(?P<value>[^"]*)"\})?')


def engine_families(stats: Stats, labels: Mapping[str, str]) -> list[Metric]:
    """Families of an engine's statistics. A key may carry one label (`name{reason="pages"}`); counters
    `name_bucket{le="8"}`, cumulative as Prometheus has them, and `name_sum` make a histogram."""
    families: dict[str, Metric] = {}
    histograms = _histogram_families(stats.counters, labels)
    for values, kind in ((stats.counters, CounterMetricFamily), (stats.gauges, GaugeMetricFamily)):
        for key, value in values.items():
            match = _KEY.fullmatch(key)
            if match is None or re.sub("_(bucket|sum|count)$", "", match["name"]) in histograms:
                continue
            own = {match["label"]: match["value"]} if match["label"] else {}
            name = match["name"].removesuffix("_total") if kind is CounterMetricFamily else match["name"]
            if name not in families:
                families[name] = kind(name, _help(name), labels=[*labels, *own])
            families[name].add_metric([*labels.values(), *own.values()], value)  # type: ignore[attr-defined]
    return [*families.values(), *histograms.values()]


def _histogram_families(counters: Mapping[str, float], labels: Mapping[str, str]) -> dict[str, Metric]:
    buckets: dict[str, dict[float, float]] = defaultdict(dict)
    for key, value in counters.items():
        match = _KEY.fullmatch(key)
        if match is not None and match["label"] == "le":
            buckets[match["name"].removesuffix("_bucket")][float(match["value"])] = value
    families: dict[str, Metric] = {}
    for name, counts in buckets.items():
        edges = [("+Inf" if bound == inf else str(bound), count) for bound, count in sorted(counts.items())]
        family = HistogramMetricFamily(name, _help(name), labels=list(labels))
        family.add_metric(list(labels.values()), edges, counters.get(f"{name}_sum", 0.0))
        families[name] = family
    return families


def _help(name: str) -> str:
    return HELP.get(name, f"{name.replace('_', ' ').capitalize()}.")
