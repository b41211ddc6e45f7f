"""What is handed to the server's metrics; documents and dashboard name only families that exist.

The real metrics page is read in test_streams.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from decoding.loop import RoundStats
from tests.triton.support import wait_until
from triton_repo.families import COUNTER, FAMILIES, GAUGE, HISTOGRAM, PHASES
from triton_repo.metrics import Metrics

DOCS = Path(__file__).parents[2] / "docs"
BUILT_IN = {"nv_inference_request_success", "nv_inference_request_failure"}  # Triton's own


class Metric:
    """Stands for one metric of the server: each call is a message to it."""

    def __init__(self):
        self.value, self.calls = 0, 0

    def increment(self, n):
        assert n > 0
        self.value, self.calls = self.value + n, self.calls + 1

    def set(self, n):
        self.value, self.calls = n, self.calls + 1


class Family:
    """Stands for the python backend's MetricFamily."""

    def __init__(self, made, name, description, kind):
        assert description and kind in (COUNTER, GAUGE)
        self.made, self.name, self.kind = made, name, kind

    def Metric(self, labels):
        return self.made.setdefault((self.name, *labels.values()), Metric())


@pytest.fixture
def made():
    return {}


@pytest.fixture
def metrics(made):
    def family(**options):
        return Family(made, **options)

    family.COUNTER, family.GAUGE = COUNTER, GAUGE
    monitor = SimpleNamespace(error=np.array([0.01, np.nan, 0.2]), warnings=0, warning=None)
    metrics = Metrics(SimpleNamespace(MetricFamily=family), 3, monitor)
    metrics.monitor = monitor
    yield metrics
    metrics.close()


def trace(drafted, budget):
    return SimpleNamespace(drafted=np.array(drafted), budget=budget, **{f"{phase}_seconds": 0.25 for phase in PHASES})


def step(traces, probes=0):
    return SimpleNamespace(seconds=1.5, active=2, waiting=7, kv_tokens=30, kv_bytes=4096, probes=probes, traces=traces)


def test_numbers_reach_their_families(metrics, made):
    metrics.step(step([]))
    metrics.step(step([trace([True, False], 2)], probes=1))
    metrics.step(step([trace([False, False], 0)]))
    metrics.tokens(None, 1)
    metrics.first_token(0.2, 11)
    metrics.tokens(RoundStats(drafted=3, verified=2, accepted=1), 2)
    metrics.next_tokens(0.1, 2)
    metrics.tokens(RoundStats(drafted=0, verified=0, accepted=0), 1)
    metrics.monitor.warnings = 1
    metrics.ended("stop")
    value = lambda *key: made[key].value
    wait_until(lambda: value("dspark_requests_total", "stop") == 1, "the hand-over")
    metrics.flush()
    for name, want in (
        ("rounds_total", 3),
        ("rounds_without_draft_total", 1),
        ("probes_total", 1),
        ("request_rounds_total", 2),
        ("drafts_total", 1),
        ("draft_tokens_total", 3),
        ("emitted_tokens_total", 4),
        ("prompt_tokens_total", 11),
        ("acceptance_length", 1.5),
        ("active_requests", 2),
        ("waiting_requests", 7),
        ("kv_tokens", 30),
        ("kv_capacity_bytes", 4096),
        ("calibration_warnings_total", 1),
    ):
        assert value(f"dspark_{name}") == pytest.approx(want, rel=1e-3), name
    assert [value("dspark_verified_tokens_total", k) for k in "012"] == [1, 1, 0]
    assert [value("dspark_accepted_tokens_total", k) for k in "012"] == [1, 0, 0]
    assert [value("dspark_calibration_error", k) for k in "012"] == [0.01, 0, 0.2]  # nothing is said where nothing is known
    assert [value("dspark_phase_seconds_total", phase) for phase in PHASES] == [0.5] * 5
    assert histogram(made, "dspark_round_seconds") == (3, 4.5, ["2.5", "5", "10", "+Inf"])
    assert histogram(made, "dspark_scheduled_tokens")[:2] == (2, 2.0)
    assert made["dspark_scheduled_tokens_bucket", "0"].value == made["dspark_scheduled_tokens_bucket", "1"].value == 1
    assert made["dspark_scheduled_tokens_bucket", "2"].value == 2, "a bucket holds its upper bound"
    assert histogram(made, "dspark_ttft_seconds")[:2] == (1, 0.2) and histogram(made, "dspark_itl_seconds")[:2] == (1, 0.05)


def histogram(made, name: str) -> tuple[float, float, list[str]]:
    """(count, sum, the bounds of the buckets that hold every sample)"""
    count = made[f"{name}_count",].value
    bounds = [key[1] for key, metric in made.items() if key[0] == f"{name}_bucket" and metric.value == count]
    return count, made[f"{name}_sum",].value, bounds


def test_sums_are_handed_on_together(metrics, made):
    """A thousand rounds in a moment are a few messages, and none without news."""
    for _ in range(1000):
        metrics.step(step([trace([True, True], 6)]))
        metrics.tokens(RoundStats(3, 3, 1), 2)
    metrics.ended("length")
    emitted = made["dspark_emitted_tokens_total",]
    wait_until(lambda: emitted.value == 2000, "the hand-over")
    assert emitted.calls <= 2 and histogram(made, "dspark_round_seconds")[0] == 1000
    assert sum(metric.calls for metric in made.values()) < 150
    metrics.flush()
    calls = {key: metric.calls for key, metric in made.items()}
    metrics.flush()
    assert {key: metric.calls for key, metric in made.items() if key[0] != "dspark_acceptance_length"} == {
        key: n for key, n in calls.items() if key[0] != "dspark_acceptance_length"
    }


def test_names_follow_prometheus():
    for f in FAMILIES:
        assert re.fullmatch(r"dspark_[a-z_]+", f.name) and f.name.endswith("_total") == (f.kind == COUNTER)
        assert list(f.buckets) == sorted(set(f.buckets)) and bool(f.buckets) == (f.kind == HISTOGRAM)
    assert len({f.name for f in FAMILIES}) == len(FAMILIES)


def test_the_document_lists_every_family():
    """docs/metrics.md: name, kind, label and help text of each, and no other."""
    rows = re.findall(r"^\| `(dspark_\w+)`(?:\{(\w+)\})? \| (\w+) \| (.+?) \|$", (DOCS / "metrics.md").read_text(), re.M)
    want = {(f.name, f.label[0] if f.label else "", f.kind, f.help) for f in FAMILIES}
    assert set(rows) == want and len(rows) == len(FAMILIES)


def expressions():
    def walk(node):
        if isinstance(node, dict):
            if isinstance(node.get("expr"), str):
                yield node["expr"]
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                yield from walk(child)

    return list(walk(json.loads((DOCS / "grafana.json").read_text())))


def test_the_dashboard_asks_for_families_that_exist():
    families = {f.name: f for f in FAMILIES}
    seen = set()
    assert len(expressions()) >= 15
    for expression in expressions():
        names = re.findall(r"\b(?:dspark|nv)_\w+", expression)
        assert names, expression
        for name in names:
            if name in BUILT_IN:
                continue
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            family = families.get(name) or families.get(base)
            assert family, f"{name} in {expression}"
            assert (family.kind == HISTOGRAM) == (name not in families), f"{name} in {expression}"
            if family.kind != GAUGE:  # what only grows is looked at by its growth
                assert re.search(rf"(rate|increase)\({name}[\[{{]", expression), f"{name} in {expression}"
            seen.add(family.name)
        labels = {"le", *(f.label[0] for f in families.values() if f.label)}
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            assert set(re.split(r",\s*", group)) <= labels, expression
        assert expression.count("(") == expression.count(")")
    assert seen == set(families), f"the dashboard leaves out {set(families) - seen}"
