"""When the tokens of a request came, and what a batch of answered prompts gave.

Knows: arrivals and tokens. Refuses to know: who made the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .common import Acceptance


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


@dataclass(frozen=True)
class Run:
    """All answers of a set of prompts, in order, and the acceptance over their rounds."""

    timings: list[Timing]
    acceptance: Acceptance
