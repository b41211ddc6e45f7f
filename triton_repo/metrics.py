"""Prometheus metrics of the model `dspark` through the python backend's custom metrics.

Knows: names and meanings of the counters. Refuses to know: rounds and requests (the service's sender thread reports).
Counters are summed here and handed on at most every 0.1 s: each hand-over is a message to the server process.
"""

from __future__ import annotations

import time

PERIOD_SECONDS = 0.1
ROUND_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """An Observer (service.py). pb_utils is the module that the python backend gives its models."""

    def __init__(self, pb_utils, block_size: int):
        family = pb_utils.MetricFamily
        self._families = []

        def make(kind, name: str, description: str, labels: dict | None = None, **extra):
            self._families.append(family(name=name, description=description, kind=kind))
            return self._families[-1].Metric(labels=labels or {}, **extra)

        self._drafts = make(family.COUNTER, "dspark_drafts_total", "Blocks that were drafted and verified")
        self._drafted = make(family.COUNTER, "dspark_draft_tokens_total", "Draft tokens that the target verified")
        self._emitted = make(family.COUNTER, "dspark_emitted_tokens_total", "Tokens sent to clients")
        self._rounds = make(family.COUNTER, "dspark_rounds_total", "Decoding rounds")
        self._active = make(family.GAUGE, "dspark_active_requests", "Requests that hold a slot")
        self._waiting = make(family.GAUGE, "dspark_waiting_requests", "Requests that wait for a slot")
        positions = family(
            name="dspark_accepted_tokens_total", description="Accepted draft tokens by position", kind=family.COUNTER
        )
        self._families.append(positions)
        self._accepted = [positions.Metric(labels={"position": str(k)}) for k in range(block_size)]
        self._seconds = make(
            family.HISTOGRAM, "dspark_round_seconds", "Duration of a decoding round", buckets=list(ROUND_BUCKETS)
        )
        counters = (self._drafts, self._drafted, self._emitted, self._rounds, *self._accepted)
        self._counts = {counter: 0 for counter in counters}
        self._durations: list[float] = []
        self._gauges, self._shown = (0, 0), (0, 0)
        self._flushed = 0.0

    def round(self, seconds: float) -> None:
        self._counts[self._rounds] += 1
        self._durations.append(seconds)

    def request(self, verified: int, accepted: int, emitted: int) -> None:
        """One request's share of a round: draft tokens verified and accepted, tokens emitted."""
        self._counts[self._drafts] += verified > 0
        self._counts[self._drafted] += verified
        self._counts[self._emitted] += emitted
        for metric in self._accepted[:accepted]:
            self._counts[metric] += 1

    def gauges(self, active: int, waiting: int) -> None:
        self._gauges = (active, waiting)

    def flush(self) -> None:
        """Hands on what came up since the last time, at most every 0.1 s."""
        now = time.monotonic()
        if now - self._flushed < PERIOD_SECONDS:
            return
        self._flushed = now
        for metric, count in self._counts.items():
            if count:
                metric.increment(count)
                self._counts[metric] = 0
        for seconds in self._durations:
            self._seconds.observe(seconds)
        self._durations.clear()
        if self._gauges != self._shown:
            self._shown = self._gauges
            self._active.set(self._gauges[0])
            self._waiting.set(self._gauges[1])
