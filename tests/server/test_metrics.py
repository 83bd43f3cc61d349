"""What Prometheus would read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.server.metrics import Histogram, Metrics
from jaxserve.types import Stats


def samples(text: bytes) -> dict[tuple[str, frozenset], float]:
    families = text_string_to_metric_families(text.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


@given(st.lists(st.floats(0, 1e6)))
def test_histograms_count_like_prometheus(values: list[float]):
    histogram = Histogram("help", (1, 10, 100))
    for value in values:
        histogram.observe(value)
    found = {s.labels.get("le", s.name): s.value for s in histogram.family("h", {}).samples}
    for bound in ("1.0", "10.0", "100.0", "+Inf"):
        assert found[bound] == sum(value <= float(bound) for value in values)
    assert found["h_count"] == len(values) and found["h_sum"] == histogram.sum


def test_compatible_names_repeat_every_metric():
    metrics = Metrics("model", "vllm")
    metrics.e2e.observe(0.2)
    metrics.finished["stop"] += 3
    found = samples(metrics.render(Stats(counters={"generation_tokens": 7}, gauges={"num_requests_running": 2})))
    ours = {key: value for key, value in found.items() if key[0].startswith("jaxserve:")}
    theirs = {
        (name.replace("vllm:", "jaxserve:"), labels): value
        for (name, labels), value in found.items()
        if name.startswith("vllm:")
    }
    assert ours == theirs and len(found) == 2 * len(ours)
    labels = frozenset({("model_name", "model"), ("engine", "0")})
    assert found["vllm:generation_tokens_total", labels] == 7
    assert found["jaxserve:num_requests_running", labels] == 2
    assert found["jaxserve:request_success_total", labels | {("finished_reason", "stop")}] == 3


def test_engine_statistics_may_carry_labels_and_buckets():
    counters = {
        'refused{reason="pages"}': 2,
        'refused{reason="length"}': 1,
        'steps_bucket{le="8"}': 4,
        'steps_bucket{le="inf"}': 6,
        "steps_sum": 90,
        "already_total": 5,
    }
    found = samples(Metrics("m").render(Stats(counters=counters, gauges={})))
    base = frozenset({("model_name", "m"), ("engine", "0")})
    assert found["jaxserve:refused_total", base | {("reason", "pages")}] == 2
    assert found["jaxserve:steps_bucket", base | {("le", "8.0")}] == 4
    assert found["jaxserve:steps_count", base] == 6 and found["jaxserve:steps_sum", base] == 90
    assert found["jaxserve:already_total", base] == 5


def test_without_an_engine_the_requests_are_still_there():
    assert b"jaxserve:e2e_request_latency_seconds_count" in Metrics("m").render(None)
