"""A closed loop in its steady state: which requests are sent, which tokens count, and what they amount to.

Knows: when a window opens and closes. Refuses to know: who decodes, how a request travels.

`concurrency` users send their next request as soon as their answer has ended. The window opens when every user has got a
first token, and closes when `tokens` more have come: until then all users are busy, so neither the first prefill nor the
drain at the end is in it; what still runs is cancelled. The users' first answers are cut at different lengths, as if
the load had been running for a while: otherwise all of them would prefill at the same time again and again.
Every mode gets the same requests in the same order and the same number of tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .common import Acceptance


@dataclass(frozen=True)
class Plan:
    """tokens: output tokens of the window; max_tokens: of an answer; first: prompt of request 0; seed: of request 0.

    Greedy answers may end before max_tokens, at the same token in every mode; sampled ones differ from mode to mode, so
    they run on over the end of sequence and all have max_tokens.
    """

    concurrency: int
    tokens: int
    max_tokens: int = 64
    first: int = 0
    temperature: float = 0.0
    seed: int = 0

    @property
    def ignore_eos(self) -> bool:
        return self.temperature > 0

    def prompt(self, request: int, prompts: int) -> int:
        """Which of `prompts` prompts request number `request` asks."""
        return (self.first + request) % prompts

    def length(self, request: int) -> int:
        """max_tokens of a request: the users' first answers end one after the other."""
        if request >= self.concurrency:
            return self.max_tokens
        return max(1, self.max_tokens * (request + 1) // self.concurrency)


@dataclass
class _Request:
    submitted: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (time, tokens of that response)


class Window:
    """Hears of every response and counts those inside. Any threads may call; times are seconds of one clock."""

    def __init__(self, plan: Plan):
        self.plan, self.opened, self.closed = plan, None, None
        self.acceptance, self.undrafted = Acceptance(), 0
        self._requests: list[_Request] = []
        self._missing = plan.concurrency  # users without a first token
        self.tokens = 0  # inside
        self._lock = threading.Lock()

    @property
    def arrivals(self) -> list[list[tuple[float, int]]]:
        """(time, tokens) of each request's responses, those outside the window included."""
        return [r.arrivals for r in self._requests]

    def submit(self, now: float) -> int:
        """Number of the request that a user sends now."""
        with self._lock:
            self._requests.append(_Request(now))
            return len(self._requests) - 1

    def heard(self, request: int, now: float, tokens: int) -> bool:
        """A response with `tokens` new tokens. True when it lies in the window (its rounds are then to be counted)."""
        with self._lock:
            if tokens:
                seen = self._requests[request]
                self._missing -= request < self.plan.concurrency and not seen.arrivals
                seen.arrivals.append((now, tokens))
            if self.opened is None:
                if not self._missing:
                    self.opened = now
                return False
            inside = now > self.opened and (self.closed is None or now <= self.closed)
            if inside:
                self.tokens += tokens
                if self.tokens >= self.plan.tokens and self.closed is None:
                    self.closed = now
            return inside

    def rounds(self, rounds: int, verified: int, accepted: int, undrafted: int = 0) -> None:
        """Verify rounds of one request inside the window: draft tokens verified and accepted; rounds without a draft."""
        with self._lock:
            a = self.acceptance
            a.rounds, a.verified, a.accepted = a.rounds + rounds, a.verified + verified, a.accepted + accepted
            self.undrafted += undrafted

    def summary(self) -> dict:
        """total_tok_s; user_tok_s (after the first token, pooled over users); ttft_ms (median over the requests that were
        sent inside; over all when none was); itl_ms and itl_p95_ms over tokens (a response of n tokens after a gap
        gives n values gap / n); acceptance_length, verified_per_round, rejected_share; tokens, seconds.
        None where nothing was seen.
        """
        spans = []
        for r in self._requests:
            pairs = zip(r.arrivals, r.arrivals[1:])
            spans += [(b - a, n) for (a, _), (b, n) in pairs if self.opened <= a and b <= self.closed]
        gaps, counts = np.array([g for g, _ in spans]), np.array([n for _, n in spans], np.int64)
        each = np.repeat(gaps / counts, counts) if spans else np.zeros(0)
        first = [r for r in self._requests if r.arrivals and r.arrivals[0][0] <= self.closed]
        inside = [r for r in first if r.submitted >= self.opened] or first
        seconds, a = self.closed - self.opened, self.acceptance
        return {
            "total_tok_s": self.tokens / seconds,
            "user_tok_s": float(counts.sum() / gaps.sum()) if spans else None,
            "ttft_ms": 1e3 * float(np.median([r.arrivals[0][0] - r.submitted for r in inside])),
            "itl_ms": _ms(each, 50),
            "itl_p95_ms": _ms(each, 95),
            "acceptance_length": a.length,
            "verified_per_round": a.verified / a.rounds if a.rounds else 0.0,
            "rejected_share": 1 - a.accepted / a.verified if a.verified else 0.0,
            "tokens": self.tokens,
            "seconds": seconds,
        }


def _ms(seconds: Sequence[float], percentile: float) -> float | None:
    return 1e3 * float(np.percentile(seconds, percentile)) if len(seconds) else None
