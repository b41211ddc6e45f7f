"""Schedulers: how many draft tokens of each request the target verifies in this round.

Knows: calibrated confidences and what the round looks like. Refuses to know: tokens, probabilities, engines.

Losslessness: whether slot k is verified may use only what is known before token x_k is drawn. c_k depends on x_{k-1}
and hidden states, so a cut decided slot by slot from c_1 .. c_k is safe; anything that looks at c_{k+1}, ... to decide
about slot k is not (the paper's Appendix A).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy import ndarray


@dataclass(frozen=True)
class RoundState:
    """What a scheduler may look at, for the R requests that have a draft in this round.

    confidence [R, G]: calibrated chance that slot k is accepted given that all before it were (near 1 without a
    confidence head). threshold [R]: the requests' own thresholds, NaN where none. context [R]: tokens each holds.
    plain: requests decoded without a draft; prefill: prompt tokens still to be fed. The last three are for
    load-aware schedulers, with the cost table of the bundle's manifest (`sps`).
    """

    confidence: ndarray
    threshold: ndarray
    context: ndarray
    plain: int = 0
    prefill: int = 0

    @property
    def survival(self) -> ndarray:
        """[R, G]: chance that slots 0 .. k are all accepted."""
        return np.cumprod(self.confidence, axis=1)


class Scheduler(Protocol):
    """`lengths` -> [R] int64 in 0..G. drafts, uses_confidence: whether the draft, its confidence head are run at all."""

    drafts: bool
    uses_confidence: bool

    def lengths(self, state: RoundState) -> ndarray: ...


class NoDraft:
    """Plain decoding with the target alone."""

    drafts = uses_confidence = False

    def lengths(self, state: RoundState) -> ndarray:
        return np.zeros(len(state.confidence), np.int64)


class Fixed:
    """The whole block, or its first `length` tokens."""

    drafts, uses_confidence = True, False

    def __init__(self, length: int | None = None):
        if length is not None and length < 0:
            raise ValueError(f"length is {length}; it must be 0 or more.")
        self.length = length

    def lengths(self, state: RoundState) -> ndarray:
        R, G = state.confidence.shape
        return np.full(R, G if self.length is None else min(self.length, G), np.int64)


class Threshold:
    """The block up to the first slot whose own confidence lies under the threshold (the reference's static rule)."""

    drafts = uses_confidence = True

    def __init__(self, threshold: float = 0.5):
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold is {threshold}; it must lie in 0..1.")
        self.threshold = threshold

    def lengths(self, state: RoundState) -> ndarray:
        bound = np.where(np.isnan(state.threshold), self.threshold, state.threshold)
        return np.cumprod(state.confidence >= bound[:, None], axis=1).sum(axis=1).astype(np.int64)


SCHEDULES = ("none", "fixed", "threshold")


def make(name: str, threshold: float | None = None) -> Scheduler:
    """A scheduler by its name on the command line. Raises ValueError for an unknown one."""
    if name == "none":
        return NoDraft()
    if name == "fixed":
        return Fixed()
    if name == "threshold":
        return Threshold() if threshold is None else Threshold(threshold)
    raise ValueError(f"schedule is {name!r}; it must be one of {', '.join(SCHEDULES)}.")
