"""The metric families of the model `dspark`: names, kinds, labels, buckets and help texts, in one table.

Knows: what is on the metrics page (docs/metrics.md and the dashboard are checked against this). Refuses to know:
values.
"""

from __future__ import annotations

from dataclasses import dataclass

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHORT_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
WAIT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
REASONS = ("stop", "length", "cancelled", "error", "refused")
PHASES = ("draft", "schedule", "target", "verify", "host")


@dataclass(frozen=True)
class Family:
    """label: the one label of its metrics and the values it takes (None: the draft's positions 0 .. G-1)."""

    name: str
    kind: str
    help: str
    label: tuple[str, tuple[str, ...] | None] | None = None
    buckets: tuple[float, ...] = ()  # of a histogram


POSITION = ("position", None)

FAMILIES = (
    Family("dspark_requests_total", COUNTER, "Requests that ended, by finish reason", ("finish_reason", REASONS)),
    Family("dspark_prompt_tokens_total", COUNTER, "Prompt tokens of the requests that got their first token"),
    Family("dspark_emitted_tokens_total", COUNTER, "Tokens decoded for clients"),
    Family("dspark_rounds_total", COUNTER, "Steps of the decoding loop, those of prefill included"),
    Family("dspark_rounds_without_draft_total", COUNTER, "Steps with requests in decode for which no draft was made"),
    Family("dspark_probes_total", COUNTER, "Steps that drafted only to see whether drafting pays again"),
    Family("dspark_drafts_total", COUNTER, "Blocks that the draft made, one per request and round"),
    Family("dspark_draft_tokens_total", COUNTER, "Draft tokens made"),
    Family("dspark_verified_tokens_total", COUNTER, "Draft tokens that the target judged, by position", POSITION),
    Family("dspark_accepted_tokens_total", COUNTER, "Draft tokens accepted, by position", POSITION),
    Family("dspark_request_rounds_total", COUNTER, "Verify passes, one per request and round"),
    Family("dspark_acceptance_length", GAUGE, "Tokens that a round yields for a request, mean of about 10 s"),
    Family("dspark_scheduled_tokens", HISTOGRAM, "Draft tokens admitted to a step over all requests", None, TOKENS),
    Family("dspark_calibration_error", GAUGE, "Predicted less observed survival, absolute, by position", POSITION),
    Family("dspark_calibration_warnings_total", COUNTER, "Times that the calibration error rose past its bound"),
    Family("dspark_active_requests", GAUGE, "Requests that hold a slot"),
    Family("dspark_waiting_requests", GAUGE, "Requests that wait for a slot"),
    Family("dspark_kv_tokens", GAUGE, "Tokens that the target's cache holds"),
    Family("dspark_kv_capacity_bytes", GAUGE, "Memory of the target's and the draft's caches"),
    Family("dspark_ttft_seconds", HISTOGRAM, "From a request's arrival to its first token", None, WAIT_SECONDS),
    Family("dspark_itl_seconds", HISTOGRAM, "Time between tokens: a response's gap over them", None, SHORT_SECONDS),
    Family("dspark_round_seconds", HISTOGRAM, "Duration of a step of the decoding loop", None, SECONDS),
    Family("dspark_phase_seconds_total", COUNTER, "Time of the steps with decode, by phase", ("phase", PHASES)),
)  # fmt: skip
