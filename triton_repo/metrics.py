"""Prometheus metrics of the model `dspark` through the python backend's custom metrics.

Knows: which family a number belongs to, and how often the server hears of it. Refuses to know: what a round is (the
service's sender thread reports), names and help texts (families.py).
Numbers are summed here; a thread of its own hands them on, at most twice a second, since each hand-over is a message to
the server process and back (40 microseconds) that no response should wait for. With no news it sleeps.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict

from .families import COUNTER, FAMILIES, GAUGE, HISTOGRAM, PHASES

log = logging.getLogger(__name__)

PERIOD_SECONDS = 0.5
WINDOW_SECONDS = 10.0  # of dspark_acceptance_length: older rounds count e times less


class Metrics:
    """An Observer (service.py). pb_utils is the module that the python backend gives its models."""

    def __init__(self, pb_utils, block_size: int, monitor=None):
        """monitor: has `error` [G] and `warnings` (decoding.monitor.CalibrationMonitor); None: no calibration
        metrics."""
        family = pb_utils.MetricFamily
        kinds = {COUNTER: family.COUNTER, GAUGE: family.GAUGE, HISTOGRAM: family.HISTOGRAM}
        self._families, self._metrics = [], {}
        for f in FAMILIES:
            made = family(name=f.name, description=f.help, kind=kinds[f.kind])
            self._families.append(made)  # a family's metrics are gone with its object
            label, values = f.label or ("", ("",))
            extra = {"buckets": list(f.buckets)} if f.kind == HISTOGRAM else {}
            for value in values or [str(k) for k in range(block_size)]:
                self._metrics[f.name, value] = made.Metric(labels={label: value} if label else {}, **extra)
        self._monitor, self._warnings = monitor, 0
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, str], float] = defaultdict(float)
        self._samples: list[tuple[str, float]] = []
        self._levels: dict[tuple[str, str], float] = {}
        self._shown: dict[tuple[str, str], float] = {}
        self._window = [0.0, 0.0, time.monotonic()]  # tokens, request rounds, when they were last aged
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._publish, name="dspark-metrics", daemon=True)
        self._thread.start()

    # Called by the sender thread.

    def step(self, step) -> None:
        """One step of the loop (responses.Step)."""
        with self._lock:
            self._sums["dspark_rounds_total", ""] += 1
            self._samples.append(("dspark_round_seconds", step.seconds))
            self._levels["dspark_active_requests", ""] = step.active
            self._levels["dspark_waiting_requests", ""] = step.waiting
            self._levels["dspark_kv_tokens", ""] = step.kv_tokens
            self._levels["dspark_kv_capacity_bytes", ""] = step.kv_bytes
            self._sums["dspark_probes_total", ""] += step.probes
            for trace in step.traces:
                self._sums["dspark_rounds_without_draft_total", ""] += not trace.drafted.any()
                self._samples.append(("dspark_scheduled_tokens", trace.budget))
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
            self._samples.append(("dspark_ttft_seconds", seconds))

    def next_tokens(self, seconds: float, count: int) -> None:
        """A response with `count` tokens of a request, the newest `seconds` after that of the response before: one
        sample, the mean gap."""
        with self._lock:
            self._samples.append(("dspark_itl_seconds", seconds / count))
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
            samples, self._samples = self._samples, []
            levels = dict(self._levels)
            levels["dspark_acceptance_length", ""] = self._acceptance_length()
        if self._monitor is not None:
            levels |= self._calibration(sums)
        for key, count in sums.items():
            if count:
                self._metrics[key].increment(count)
        for name, value in samples:
            self._metrics[name, ""].observe(value)
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
