"""What one step of the loop tells its observers.

Knows: one step's requests, drafts and verdicts, and where its time went. Refuses to know: who looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Hashable, Protocol

import numpy as np
from numpy import ndarray

from .metrics import Split
from .request import Sequence

if TYPE_CHECKING:
    from .drafter import Draft


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

    @classmethod
    def of_step(
        cls, rows: list[Sequence], decode: list[bool], draft: Draft | None, accepted: list[int], spent: Split, host_seconds: float,
        tokens: int,
    ) -> RoundTrace:  # fmt: skip
        """rows: all that are active, `decode` which of them were in decode, accepted of each. Nearly every step has only such
        rows, with a draft all or none: few calls then, for a server makes a trace of each."""
        R, every = len(rows), all(decode)
        at = slice(None) if every else np.array(decode)
        logits = survival = None
        if draft is None:
            drafted, verified = nothing(R)
        else:
            drafted, verified, logits, survival = draft.drafted, draft.num_draft, draft.confidence_logits, draft.survival
            if logits is not None and (len(logits) < R or not drafted.all()):
                logits, survival = draft.spread(logits), draft.spread(survival)
            elif logits is not None:
                logits = logits.copy()  # the engine will write there again
        return cls(
            ids=[s.request.id for s, d in zip(rows, decode) if d],
            drafted=drafted[at],
            confidence_logits=None if logits is None else logits[at],
            survival=None if survival is None else survival[at],
            verified=verified[at],
            accepted=np.array(accepted)[at],
            temperature=np.array([s.temperature for s, d in zip(rows, decode) if d], np.float32),
            draft_seconds=spent.draft,
            schedule_seconds=spent.schedule,
            target_seconds=spent.target,
            verify_seconds=spent.verify,
            host_seconds=host_seconds,
            budget=sum(verified.tolist()),
            tokens=tokens,
        )


@cache
def nothing(R: int) -> tuple[ndarray, ndarray]:
    """(drafted, verified) [R] of a step without a draft; read-only."""
    arrays = np.zeros(R, bool), np.zeros(R, np.int64)
    for array in arrays:
        array.setflags(write=False)
    return arrays


class Observer(Protocol):
    """Something that sees every step with a request in decode. `wants_confidence`: run the confidence engine for it.

    Called in the loop's thread between two steps: it must be quick, and an exception of it ends the step.
    """

    wants_confidence: bool

    def round(self, trace: RoundTrace) -> None: ...
