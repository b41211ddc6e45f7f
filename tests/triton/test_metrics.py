"""What is handed to the server's metrics, and how often (the real ones are read in test_streams.py)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from triton_repo import metrics as module
from triton_repo.metrics import Metrics


class Metric:
    """Stands for one metric of the server: each call is a message to it."""

    def __init__(self):
        self.value, self.calls, self.seen = 0, 0, []

    def increment(self, n):
        self.value, self.calls = self.value + n, self.calls + 1

    def set(self, n):
        self.value, self.calls = n, self.calls + 1

    def observe(self, seconds):
        self.seen.append(seconds)


class Family:
    """Stands for the python backend's MetricFamily."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    made: dict = {}

    def __init__(self, name, description, kind):
        assert description and kind
        self.name = name

    def Metric(self, labels, buckets=None):
        return Family.made.setdefault((self.name, *labels.values()), Metric())


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
