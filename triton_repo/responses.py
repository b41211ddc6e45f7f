"""What dspark's threads hand to each other and to what is around them: one response, one step, and who takes them.

Knows: the fields and the interfaces. Refuses to know: who implements them (Triton, metrics.py, ledger.py, the tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Round:
    """One response. output_ids: the new tokens, with log_probs one for each (none where they were not asked); the
    totals run from the request's start; finish_reason is "" until the last response (stop | length | cancelled).
    An empty one with finish_reason "" is a heartbeat. settings: in the first response only."""

    uid: int
    index: int
    output_ids: list[int]
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    num_rounds: int
    total_draft_tokens: int
    accepted_per_position: list[int]  # [G]: rounds that accepted more than k draft tokens
    log_probs: list[float]
    settings: str


class Sink(Protocol):
    """Where the responses of one request go."""

    def send(self, response: Round, *, final: bool) -> None: ...

    def fail(self, message: str) -> None: ...


@dataclass(frozen=True)
class Step:
    """One step of the loop as the engine thread saw it. at: its end, perf_counter seconds; traces:
    decoding.trace.RoundTrace (none of a step that only prefilled); probes: how many of it were one."""

    outputs: list
    at: float
    seconds: float
    active: int
    waiting: int
    kv_tokens: int
    kv_bytes: int
    probes: int
    traces: list


class Observer(Protocol):
    """Called by the sender thread only (metrics.py)."""

    def step(self, step: Step) -> None: ...

    def tokens(self, stats, count: int) -> None: ...

    def first_token(self, seconds: float, prompt_tokens: int) -> None: ...

    def next_tokens(self, seconds: float, count: int) -> None: ...

    def ended(self, reason: str) -> None: ...


class Progress(Protocol):
    """Rounds of a request that postprocessing has handled; the instances of dspark in one server (ledger.py)."""

    instance: int  # this one's number, 0 .. INSTANCES - 1
    draining: bool

    def begin(self, uid: int) -> None: ...

    def read(self, uid: int) -> int: ...

    def owns(self, uid: int) -> bool: ...

    def stop(self, uid: int) -> None: ...

    def stopped(self, uid: int) -> bool: ...

    def drain(self, on: bool) -> None: ...

    def tell(self, active: int, waiting: int) -> None: ...

    def counts(self) -> tuple[int, int]: ...
