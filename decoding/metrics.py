"""Counters of a decode loop.

Knows: what is counted. Refuses to know: where it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Metrics:
    """Sums since the loop was made. A round is one verify pass of one request; times are seconds.

    verified_at[k] / accepted_at[k]: rounds in which draft slot k was verified / accepted.
    """

    block_size: int
    steps: int = 0
    rounds: int = 0
    rounds_without_draft: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    verified_tokens: int = 0
    accepted_tokens: int = 0
    prompt_tokens: int = 0
    emitted_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    engine_seconds: dict[str, float] = field(default_factory=dict)
    engine_calls: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    verified_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.verified_at, self.accepted_at = [0] * self.block_size, [0] * self.block_size

    def round(self, drafted: int, verified: int, accepted: int) -> None:
        self.rounds += 1
        self.drafts += drafted > 0
        self.rounds_without_draft += drafted == 0
        self.draft_tokens += drafted
        self.verified_tokens += verified
        self.accepted_tokens += accepted
        for k in range(verified):
            self.verified_at[k] += 1
        for k in range(accepted):
            self.accepted_at[k] += 1

    @property
    def acceptance_length(self) -> float:
        """Tokens a round yields, bonus included (the paper's tau); 0.0 before the first round."""
        return (self.accepted_tokens + self.rounds) / self.rounds if self.rounds else 0.0

    @property
    def share_outside_engines(self) -> float:
        """Share of the loop's time that no engine was running."""
        return 1.0 - sum(self.engine_seconds.values()) / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict:
        return {
            **self.__dict__,
            "acceptance_length": self.acceptance_length,
            "share_outside_engines": self.share_outside_engines,
        }
