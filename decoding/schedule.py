"""Schedulers: how many draft tokens of each request the target verifies in this round.

Knows: calibrated confidences and what the round looks like. Refuses to know: tokens, probabilities, engines.

Losslessness: whether slot k is verified may use only what is known before token x_k is drawn. c_k depends on x_{k-1}
and hidden states, so a cut decided slot by slot from c_1 .. c_k is safe; anything that looks at c_{k+1}, ... to decide
about slot k is not (the paper's Appendix A).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from engines import Engines
from engines.sps import Sps


@dataclass(frozen=True)
class RoundLoad:
    """What a scheduler knows before the draft is made: speculative requests in decode, plain ones beside them, prompt
    tokens that this step feeds, cached positions of the longest request in decode (which attention pays for)."""

    requests: int
    plain: int = 0
    prefill: int = 0
    context: float = 0.0


@dataclass(frozen=True)
class RoundState:
    """What a scheduler may look at, for the R requests that have a draft in this round.

    confidence [R, G]: calibrated chance that slot k is accepted given that all before it were (1 where the confidence
    engine does not run). threshold [R]: the requests' own thresholds, NaN where none. context: as in RoundLoad. plain:
    requests decoded without a draft; prefill: prompt tokens that this step feeds; room: draft tokens that fit
    into the step's token budget (`none`, `fixed` and `threshold` pass over it: their text depends on nothing else).
    """

    confidence: ndarray
    threshold: ndarray
    context: float
    plain: int = 0
    prefill: int = 0
    room: int = 1 << 30

    @property
    def survival(self) -> ndarray:
        """[R, G]: chance that slots 0 .. k are all accepted."""
        return np.cumprod(self.confidence, axis=1)


class ScheduleError(ValueError):
    """A scheduler that cannot be made; the message is one sentence."""


class Scheduler:
    """`lengths` -> [R] int64 in 0..G. drafts, uses_confidence: whether the draft, its confidence head are run at all.

    A step calls `draft`, then (when a draft was made) `lengths` and `observe`, then `timed`. Only `lengths` may look at
    the current round's confidences.
    """

    drafts = uses_confidence = True
    load_aware = False  # its lengths depend on more than the request itself
    probing = False  # the last `draft` was one that only looks whether drafting pays again

    def draft(self, load: RoundLoad) -> int:
        """How many requests to draft for: load.requests = all, 0 = skip the round, fewer = a probe. Past rounds only."""
        return load.requests

    def lengths(self, state: RoundState) -> ndarray:
        raise NotImplementedError

    def observe(self, verified: ndarray, accepted: ndarray) -> None:
        """verified [R], accepted [R] of the round that `lengths` was asked about, in its order."""

    def timed(self, draft_ms: float, rest_ms: float) -> None:
        """What a step without prompt tokens took: the draft's engines (0 without a draft), and all the rest of the step."""

    def idle(self) -> None:
        """The loop has run empty: what the last rounds showed says nothing about the next request."""


class NoDraft(Scheduler):
    """Plain decoding with the target alone."""

    drafts = uses_confidence = False

    def lengths(self, state: RoundState) -> ndarray:
        return np.zeros(len(state.confidence), np.int64)


class Fixed(Scheduler):
    """The whole block, or its first `length` tokens."""

    drafts, uses_confidence = True, False

    def __init__(self, length: int | None = None):
        if length is not None and length < 0:
            raise ValueError(f"length is {length}; it must be 0 or more.")
        self.length = length

    def lengths(self, state: RoundState) -> ndarray:
        R, G = state.confidence.shape
        return np.full(R, G if self.length is None else min(self.length, G), np.int64)


class Threshold(Scheduler):
    """The block up to the first slot whose own confidence lies under the threshold (the reference's static rule)."""

    drafts = uses_confidence = True

    def __init__(self, threshold: float = 0.5):
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold is {threshold}; it must lie in 0..1.")
        self.threshold = threshold

    def lengths(self, state: RoundState) -> ndarray:
        bound = np.where(np.isnan(state.threshold), self.threshold, state.threshold)
        return np.cumprod(state.confidence >= bound[:, None], axis=1).sum(axis=1).astype(np.int64)


SCHEDULES = ("none", "fixed", "threshold", "causal", "lagged")
LOAD_AWARE = ("causal", "lagged")


def make(name: str, threshold: float | None = None, sps: Sps | None = None) -> Scheduler:
    """A scheduler by its name on the command line. Raises ScheduleError for an unknown one, or one that lacks its table."""
    if name == "none":
        return NoDraft()
    if name == "fixed":
        return Fixed()
    if name == "threshold":
        return Threshold() if threshold is None else Threshold(threshold)
    if name in LOAD_AWARE:
        from .schedule_aware import Causal
        from .schedule_lagged import Lagged

        if sps is None:
            raise ScheduleError(f"schedule is {name!r} and needs an SPS table; run make profile (python -m engines profile).")
        return Causal(sps) if name == "causal" else Lagged(sps)
    raise ScheduleError(f"schedule is {name!r}; it must be one of {', '.join(SCHEDULES)}.")


def for_engines(engines: Engines, name: str, threshold: float | None = None) -> Scheduler:
    """make() for loaded engines, with their SPS table where the scheduler needs one. Raises BundleError for a table that
    is missing or not of this machine."""
    return make(name, threshold, Sps.of(engines) if name in LOAD_AWARE else None)
