"""Load-aware schedulers: verify what pays, given calibrated survival and the measured cost of a step.

Knows: the paper's Algorithm 1 and its asynchronous form (section 5.2), an SPS table, past rounds. Refuses to know:
tokens, probabilities, clocks (what a step took is told by `timed`).

A round that drafts for R requests beside `plain` others yields R + plain + (sum of the admitted survivals) tokens and
takes draft_ms(R) + target_ms(R + plain + K) + (padded slots) * slot_ms with K admitted draft tokens: throughput Theta. A
step in which the longest admitted block has q draft tokens has (R + plain) * q - K padded slots: one long block among
short ones is dearer than its own tokens. Prompt tokens in the step have to be fed in some round anyhow, so they shift
the place on the cost curve and cost nothing themselves.

Legend: R requests with a draft, G block size, K admitted draft tokens, q the longest block's, P pooled past blocks.
"""

from __future__ import annotations

import math

import numpy as np
from numpy import ndarray

from engines.sps import Sps

from .schedule import RoundLoad, RoundState, Scheduler

# Of a deviation from the table: what a round corrects that follows one of its kind (with or without a draft), how much of
# that is believed of the other kind too (a machine that is slow today is slow with both), what a rare round corrects (the
# first ones more: 1/2, 1/3, ..).
SLOW, SHARED, RARE = 0.02, 0.9, 0.15


def descending(survival: ndarray) -> ndarray:
    """[R*G]: the entries of `survival` [R, G], largest first: the paper's order of candidates."""
    return -np.sort(-survival, axis=None)


def top_k(survival: ndarray, K: int, ordered: ndarray) -> ndarray:
    """[R] int64: how many slots of each row are among the K largest positive entries of `survival` [R, G].

    Rows must not increase, so the admitted slots are prefixes. Ties go by (slot, row). ordered: descending(survival).
    """
    R = len(survival)
    if K <= 0 or not len(ordered):
        return np.zeros(R, np.int64)
    bound = ordered[min(K, len(ordered)) - 1]
    if not bound > 0:
        return np.count_nonzero(survival > 0, axis=1)
    lengths = np.count_nonzero(survival > bound, axis=1)
    left = K - int(lengths.sum())
    if left:
        ties = np.flatnonzero(survival.T == bound)[:left]
        lengths += np.bincount(ties % R, minlength=R)
    return lengths


def longest(survival: ndarray) -> ndarray:
    """[R*G + 1] int64: draft tokens of the longest block when 0, 1, .. candidates are admitted in top_k's order.

    Slot k of any row is reached once all candidates before the best of its column are in: those of earlier columns that
    are no worse. Entry i says nothing of a candidate behind i, not even that it is as good.
    """
    R, G = survival.shape
    best = survival.max(axis=0)
    before = np.array([np.count_nonzero(survival[:, :k] >= best[k]) for k in range(G)])
    return np.searchsorted(before, np.arange(R * G + 1), "left")


class LoadAware(Scheduler):
    """What `causal` and `lagged` share: costs, their slow drift, survival without a confidence head."""

    load_aware = True

    def __init__(self, sps: Sps):
        self.sps = sps
        self.uses_confidence = sps.has_confidence
        self.speed = {True: 1.0, False: 1.0}  # measured over predicted time of rounds with and without a draft
        self._predicted: tuple[bool, float] | None = None
        self._timed: bool | None = None  # the kind of the last round compared
        self._rare = {True: 0, False: 0}
        self._judged = self._held = None  # [G], decayed: how often slot k was judged, accepted

    def survival(self, state: RoundState) -> ndarray:
        """[R, G]: of the calibrated confidences, or what past rounds accepted where the draft has no confidence head."""
        R, G = state.confidence.shape
        if self.uses_confidence:
            return np.cumprod(state.confidence, axis=1, dtype=np.float64)
        if self._judged is None:
            self._judged, self._held = np.zeros(G), np.zeros(G)
        mean = (self._held.sum() + 1.0) / (self._judged.sum() + 1.0)  # what an unseen slot is taken for
        return np.tile(np.cumprod((self._held + mean) / (self._judged + 1.0)), (R, 1))

    def costs(self, R: int, plain: int, prefill: int, context: float, most: int) -> tuple[ndarray, float, float]:
        """([most + 1] ms of a round that drafts for R and verifies 0 .. most draft tokens without a padded slot, ms of the
        plain round, ms of a padded slot)."""
        rows = R + plain
        curve = self.sps.curve(rows, rows + prefill + most, context)
        target = curve[rows + prefill : rows + prefill + most + 1]
        if prefill:
            target = target + (curve[rows] - curve[rows + prefill])
        speed = self.speed[True]
        drafted = (target + self.sps.others(R, context)[0]) * speed
        return drafted, float(curve[rows]) * self.speed[False], self.sps.others(rows, context)[1] * speed

    def algorithm1(self, survival: ndarray, ordered: ndarray, state: RoundState) -> tuple[int, ndarray]:
        """(K, costs [R*G + 1]): the first candidate of `ordered` (survivals, descending) that does not raise Theta ends
        the search. What candidate i costs depends on the candidates before it alone."""
        R, rows, n = len(survival), len(survival) + state.plain, len(ordered)
        costs, _, slot_ms = self.costs(R, state.plain, state.prefill, state.context, n)
        if slot_ms:
            costs = costs + slot_ms * (rows * longest(survival) - np.arange(n + 1))
        theta = np.empty(n + 1)
        theta[0] = rows
        np.cumsum(ordered, out=theta[1:])
        theta[1:] += rows
        theta /= costs
        return first(theta[1:] <= theta[:-1]), costs

    def observe(self, verified: ndarray, accepted: ndarray) -> None:
        if self._judged is None or not len(verified):
            return
        slots, decay = np.arange(len(self._judged)), 0.98 ** len(verified)
        judged = (slots < verified[:, None]) & (slots <= accepted[:, None])
        self._judged = decay * self._judged + judged.sum(axis=0)
        self._held = decay * self._held + (slots < accepted[:, None]).sum(axis=0)

    def expect(self, drafted: bool, ms: float | None) -> None:
        """What the table says about this round, for `timed`; None: nothing to compare with."""
        self._predicted = None if ms is None else (drafted, ms)

    def timed(self, draft_ms: float, rest_ms: float) -> None:
        if self._predicted is None:
            return
        (drafted, ms), self._predicted = self._predicted, None
        if drafted != (draft_ms > 0):
            return
        again, self._timed = drafted == self._timed, drafted
        error = math.log(max(draft_ms + rest_ms, 1e-9) / (ms * self.speed[drafted]))
        self._rare[drafted] += not again
        error = min(max(error, -0.7), 0.7) * (SLOW if again else max(1.0 / (1 + self._rare[drafted]), RARE))
        self._correct(drafted, error)
        if again:
            self._correct(not drafted, SHARED * error)

    def _correct(self, kind: bool, error: float) -> None:
        self.speed[kind] = min(max(self.speed[kind] * math.exp(error), 0.2), 5.0)


class Causal(LoadAware):
    """Algorithm 1: candidates in the order of their survival, admitted until one does not raise Theta."""

    def lengths(self, state: RoundState) -> ndarray:
        survival = self.survival(state)
        if not survival.size:
            return np.zeros(len(survival), np.int64)
        ordered = descending(survival)
        return top_k(survival, min(self.algorithm1(survival, ordered, state)[0], state.room), ordered)


def first(failed: ndarray) -> int:
    """Index of the first True, or how many there are."""
    at = int(failed.argmax())
    return at if failed[at] else len(failed)
