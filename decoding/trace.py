"""What one step of the loop tells its observers.

Knows: one step's requests, drafts and verdicts, and where its time went. Refuses to know: who looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Hashable, Protocol

from numpy import ndarray


@dataclass(frozen=True)
class RoundTrace:
    """One step that had R requests in decode, in the order of their cache rows.

    ids [R]; drafted [R] bool: had a draft made for it; confidence_logits [R, G] as the graph gives them, survival [R,
    G] calibrated (both NaN in rows without a draft, None where the confidence engine did not run); verified [R],
    accepted [R] draft tokens (0 without a draft); temperature [R] float32 (0 = greedy). Seconds of the step: draft
    (backbone, markov, confidence), schedule, target, verify, host (everything else). budget: draft tokens admitted;
    tokens: packed tokens of the target's passes, prompt tokens included.
    """

    ids: list[Hashable]
    drafted: ndarray
    confidence_logits: ndarray | None
    survival: ndarray | None
    verified: ndarray
    accepted: ndarray
    temperature: ndarray
    draft_seconds: float
    schedule_seconds: float
    target_seconds: float
    verify_seconds: float
    host_seconds: float
    budget: int
    tokens: int


class Observer(Protocol):
    """Something that sees every step with a request in decode. `wants_confidence`: run the confidence engine for it.

    Called in the loop's thread between two steps: it must be quick, and an exception of it ends the step.
    """

    wants_confidence: bool

    def round(self, trace: RoundTrace) -> None: ...
