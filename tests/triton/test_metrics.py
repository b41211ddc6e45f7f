"""What is handed to the server's metrics, and how often (the real ones are read in test_streams.py)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from triton_repo import metrics as module
from triton_repo.metrics import Metrics


class Family:
    """Stands for the python backend's MetricFamily."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    made: dict = {}

    def __init__(self, name, description, kind):
        assert description
        self.name, self.kind = name, kind

    def Metric(self, labels, buckets=None):
        metric = SimpleNamespace(kind=self.kind, value=0, seen=[], calls=0)
        metric.increment = lambda n: (setattr(metric, "value", metric.value + n), setattr(metric, "calls", metric.calls + 1))
        metric.set = lambda n: (setattr(metric, "value", n), setattr(metric, "calls", metric.calls + 1))
        metric.observe = metric.seen.append
        Family.made[(self.name, *labels.values())] = metric
        return metric


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.seconds)
    return now


def test_sums_are_handed_on_at_most_every_tenth_of_a_second(clock):
    Family.made = {}
    metrics, made = Metrics(SimpleNamespace(MetricFamily=Family), 3), Family.made
    metrics.flush()
    for _ in range(5):
        metrics.round(0.02)
        metrics.request(verified=3, accepted=2, emitted=3)
        metrics.request(verified=0, accepted=0, emitted=1)
        metrics.gauges(2, 7)
        metrics.flush()
    assert made[("dspark_rounds_total",)].calls == 0
    clock.seconds += 0.11
    metrics.flush()
    metrics.flush()
    values = {name: m.value for name, m in made.items()}
    assert values[("dspark_rounds_total",)] == 5 and made[("dspark_rounds_total",)].calls == 1
    assert values[("dspark_drafts_total",)] == 5
    assert values[("dspark_draft_tokens_total",)] == 15
    assert values[("dspark_emitted_tokens_total",)] == 20
    assert [values[("dspark_accepted_tokens_total", k)] for k in "012"] == [5, 5, 0]
    assert (values[("dspark_active_requests",)], values[("dspark_waiting_requests",)]) == (2, 7)
    assert made[("dspark_round_seconds",)].seen == [0.02] * 5
