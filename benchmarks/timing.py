"""When the tokens of a request came, and what a run of many requests amounts to.

Knows: TTFT, ITL, tokens a second. Refuses to know: who made the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .common import Acceptance, median


@dataclass
class Timing:
    """One request: when it was submitted, when each response came (seconds of one clock), and its tokens."""

    submitted: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (time, tokens in that response)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, now: float, tokens: Sequence[int]) -> None:
        if len(tokens):
            self.arrivals.append((now, len(tokens)))
            self.tokens.extend(int(t) for t in tokens)

    @property
    def first_token(self) -> float:
        """Time to first token, s."""
        return self.arrivals[0][0] - self.submitted

    @property
    def inter_token(self) -> float | None:
        """Mean seconds a token after the first response's; None for a request that got one response."""
        later = sum(n for _, n in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None


@dataclass
class Run:
    """What one run of a load gave."""

    seconds: float
    timings: list[Timing]
    acceptance: Acceptance
    outside_engines: float | None = None  # share of the rounds' time, in process only
    engine_seconds: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict:
        """Output tok/s in all and per user, TTFT and ITL medians (ms), acceptance."""
        per_token = [t.inter_token for t in self.timings if t.inter_token]
        tokens = sum(len(t.tokens) for t in self.timings)
        body = {
            "requests": len(self.timings),
            "output_tokens": tokens,
            "seconds": self.seconds,
            "output_tok_s": tokens / self.seconds,
            "user_tok_s": 1 / median(per_token) if per_token else float("nan"),
            "ttft_ms": 1e3 * median(t.first_token for t in self.timings),
            "itl_ms": 1e3 * median(per_token),
            "acceptance_length": self.acceptance.length,
            "verified_per_round": self.acceptance.verified / max(1, self.acceptance.rounds),
        }
        if self.outside_engines is not None:
            body["outside_engines"] = self.outside_engines
        return body
