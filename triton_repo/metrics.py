"""Prometheus metrics of the model `dspark` through the python backend's custom metrics.

Knows: which family a number belongs to, and how often the server hears of it. Refuses to know: what a round is (the
service's sender thread reports), names and help texts (families.py).
Numbers are summed here; a thread of its own hands them on, at most once a second, since each hand-over is a message to
the server process and back, and takes the cores from the rounds. With no news it sleeps. Histograms are summed here too:
their buckets, sum and count are counters, as Triton's own histograms take one message a sample.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

from .families import COUNTER, FAMILIES, GAUGE, HISTOGRAM, PHASES

log = logging.getLogger(__name__)

PERIOD_SECONDS = 1.0
WINDOW_SECONDS = 10.0  # of dspark_acceptance_length: older rounds count e times less


class Histogram:
    """Samples since the last move(), as what they add to the counters of Prometheus' histograms."""

    def __init__(self, name: str, buckets: tuple[float, ...]):
        self.name, self.buckets, self.bounds = name, buckets, [*(f"{b:g}" for b in buckets), "+Inf"]
        self._counts, self._sum = [0] * len(self.bounds), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self.buckets, value)] += 1  # a bucket holds its upper bound
        self._sum += value

    def move(self, sums: dict[tuple[str, str], float]) -> None:
        """Adds them to `sums`, by (counter, bound), and forgets them."""
        within = 0
        for bound, count in zip(self.bounds, self._counts):
            within += count
            sums[f"{self.name}_bucket", bound] = within
        sums[f"{self.name}_count", ""], sums[f"{self.name}_sum", ""] = within, self._sum
        self._counts, self._sum = [0] * len(self.bounds), 0.0


class Metrics:
    """An Observer (service.py). pb_utils is the module that the python backend gives its models."""

    def __init__(self, pb_utils, block_size: int, monitor=None):
        """monitor: has `error` [G] and `warnings` (decoding.monitor.CalibrationMonitor); None: no calibration
        metrics."""
        self._make, self._families, self._metrics = pb_utils.MetricFamily, [], {}
        self._histograms = {f.name: Histogram(f.name, f.buckets) for f in FAMILIES if f.kind == HISTOGRAM}
        for f in FAMILIES:
            if f.kind == HISTOGRAM:
                self._add(f"{f.name}_bucket", COUNTER, f.help, "le", self._histograms[f.name].bounds)
                self._add(f"{f.name}_sum", COUNTER, f.help)
                self._add(f"{f.name}_count", COUNTER, f.help)
            else:
                label, values = f.label or ("", ("",))
                self._add(f.name, f.kind, f.help, label, values or [str(k) for k in range(block_size)])
        self._monitor, self._warnings = monitor, 0
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, str], float] = defaultdict(float)
        self._levels: dict[tuple[str, str], float] = {}
        self._shown: dict[tuple[str, str], float] = {}
        self._window = [0.0, 0.0, time.monotonic()]  # tokens, request rounds, when they were last aged
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._publish, name="dspark-metrics", daemon=True)
        self._thread.start()

    def _add(self, name: str, kind: str, text: str, label: str = "", values: Sequence[str] = ("",)) -> None:
        kinds = {COUNTER: self._make.COUNTER, GAUGE: self._make.GAUGE}
        made = self._make(name=name, description=text, kind=kinds[kind])
        self._families.append(made)  # a family's metrics are gone with its object
        for value in values:
            self._metrics[name, value] = made.Metric(labels={label: value} if label else {})

    # Called by the sender thread.

    def step(self, step) -> None:
        """One step of the loop (responses.Step)."""
        with self._lock:
            self._sums["dspark_rounds_total", ""] += 1
            self._histograms["dspark_round_seconds"].add(step.seconds)
            self._levels["dspark_active_requests", ""] = step.active
            self._levels["dspark_waiting_requests", ""] = step.waiting
            self._levels["dspark_kv_tokens", ""] = step.kv_tokens
            self._levels["dspark_kv_capacity_bytes", ""] = step.kv_bytes
            self._sums["dspark_probes_total", ""] += step.probes
            for trace in step.traces:
                self._sums["dspark_rounds_without_draft_total", ""] += not trace.drafted.any()
                self._histograms["dspark_scheduled_tokens"].add(trace.budget)
                for phase in PHASES:
                    self._sums["dspark_phase_seconds_total", phase] += getattr(trace, f"{phase}_seconds")
        self._news.set()

    def tokens(self, stats, count: int) -> None:
        """What one request got from one step: `count` tokens, after a verify pass `stats`
        (decoding.loop.RoundStats)."""
        with self._lock:
            sums = self._sums
            sums["dspark_emitted_tokens_total", ""] += count
            if stats is None:
                return
            sums["dspark_request_rounds_total", ""] += 1
            sums["dspark_drafts_total", ""] += stats.drafted > 0
            sums["dspark_draft_tokens_total", ""] += stats.drafted
            for k in range(stats.verified):
                sums["dspark_verified_tokens_total", str(k)] += 1
            for k in range(stats.accepted):
                sums["dspark_accepted_tokens_total", str(k)] += 1
            self._window[0] += stats.accepted + 1
            self._window[1] += 1

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        with self._lock:
            self._sums["dspark_prompt_tokens_total", ""] += prompt_tokens
            self._histograms["dspark_ttft_seconds"].add(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """A response with `count` tokens of a request, the newest `seconds` after that of the response before: one
        sample, the mean gap."""
        with self._lock:
            self._histograms["dspark_itl_seconds"].add(seconds / count)
        self._news.set()  # a request's last response comes after its last step

    def ended(self, reason: str) -> None:
        with self._lock:
            self._sums["dspark_requests_total", reason] += 1
        self._news.set()

    def close(self) -> None:
        self._closing.set()
        self._news.set()
        self._thread.join(timeout=10)

    # The metrics thread.

    def _publish(self) -> None:
        while True:
            self._news.wait()
            over = self._closing.is_set()
            self._news.clear()
            try:
                self.flush()
            except Exception:  # the server is on its way out
                log.exception("Metrics could not be handed on")
            if over:
                return
            self._closing.wait(PERIOD_SECONDS)

    def flush(self) -> None:
        """Hands on what came up since the last time."""
        with self._lock:
            sums, self._sums = self._sums, defaultdict(float)
            for histogram in self._histograms.values():
                histogram.move(sums)
            levels = dict(self._levels)
            levels["dspark_acceptance_length", ""] = self._acceptance_length()
        if self._monitor is not None:
            levels |= self._calibration(sums)
        for key, count in sums.items():
            if count:
                self._metrics[key].increment(count)
        for key, level in levels.items():
            if self._shown.get(key) != level:
                self._metrics[key].set(level)
                self._shown[key] = level

    def _acceptance_length(self) -> float:
        now = time.monotonic()
        tokens, rounds, before = self._window
        level = tokens / rounds if rounds else 0.0
        left = math.exp((before - now) / WINDOW_SECONDS)
        self._window = [tokens * left, rounds * left, now]
        return level

    def _calibration(self, sums: dict) -> dict[tuple[str, str], float]:
        """Levels of the calibration error; its warnings, which the monitor logs, are counted once per episode."""
        warnings = self._monitor.warnings
        sums["dspark_calibration_warnings_total", ""] += warnings - self._warnings
        self._warnings = warnings
        errors = {str(k): float(error) for k, error in enumerate(self._monitor.error)}
        return {("dspark_calibration_error", k): e for k, e in errors.items() if math.isfinite(e)}
