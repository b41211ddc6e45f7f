"""Counters of a decode loop.

Knows: what is counted. Refuses to know: where it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Callable, NamedTuple


class Split(NamedTuple):
    """Seconds of the round by what they went into; host is the rest."""

    draft: float
    schedule: float
    target: float
    verify: float


@dataclass
class Metrics:
    """Sums since the loop was made. A round is one verify pass of one request; times are seconds.

    rounds_without_draft: those whose request had no draft; probes: steps that drafted for a few requests only, to see
    whether it pays again; tokens: packed tokens of steps with decoding requests; verified_lengths[n],
    accepted_lengths[a]: rounds that verified n, accepted a draft tokens; host_seconds: what the scheduler took.
    """

    block_size: int
    steps: int = 0
    rounds: int = 0
    rounds_without_draft: int = 0
    probes: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    verified_tokens: int = 0
    accepted_tokens: int = 0
    prompt_tokens: int = 0
    emitted_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    engine_seconds: dict[str, float] = field(default_factory=dict)
    engine_calls: dict[str, int] = field(default_factory=dict)
    host_seconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    verified_lengths: list[int] = field(default_factory=list)
    accepted_lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.verified_lengths, self.accepted_lengths = [0] * (self.block_size + 1), [0] * (self.block_size + 1)

    @property
    def verified_at(self) -> list[int]:
        """[G]: rounds in which draft slot k was verified."""
        return _at_least(self.verified_lengths)

    @property
    def accepted_at(self) -> list[int]:
        """[G]: rounds in which draft slot k was accepted."""
        return _at_least(self.accepted_lengths)

    def round(self, drafted: int, verified: int, accepted: int) -> None:
        self.rounds += 1
        self.drafts += drafted > 0
        self.rounds_without_draft += drafted == 0
        self.draft_tokens += drafted
        self.verified_tokens += verified
        self.accepted_tokens += accepted
        self.verified_lengths[verified] += 1
        self.accepted_lengths[accepted] += 1

    def split(self) -> Split:
        """Where the engines' and the scheduler's time has gone so far."""
        spent = self.engine_seconds.get
        draft = spent("backbone", 0.0) + spent("markov", 0.0) + spent("confidence", 0.0)
        return Split(draft, self.host_seconds.get("schedule", 0.0), spent("target", 0.0), spent("verify", 0.0))

    def add(self, name: str, seconds: float) -> None:
        """Time spent on `name`, which is no engine ("schedule")."""
        self.host_seconds[name] = self.host_seconds.get(name, 0.0) + seconds

    def timed(self, name: str, call: Callable[[Any], Any], batch: Any, read: str | None = None) -> Any:
        """call(batch), its time booked to the engine `name`. Engines on a GPU answer before they are done: `read` names
        the field of the result that is waited for within that time."""
        started = perf_counter()
        result = call(batch)
        if read is not None:
            getattr(result, read)
        self.engine_seconds[name] = self.engine_seconds.get(name, 0.0) + perf_counter() - started
        self.engine_calls[name] = self.engine_calls.get(name, 0) + 1
        return result

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
            "verified_at": self.verified_at,
            "accepted_at": self.accepted_at,
            "split": self.split()._asdict(),
            "acceptance_length": self.acceptance_length,
            "share_outside_engines": self.share_outside_engines,
        }


def _at_least(lengths: list[int]) -> list[int]:
    """[G] from counts of lengths 0..G: how many were longer than k."""
    return [sum(lengths[k + 1 :]) for k in range(len(lengths) - 1)]
