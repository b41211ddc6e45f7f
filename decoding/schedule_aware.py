"""Load-aware schedulers: verify what pays, given calibrated survival and the measured cost of a step.

Knows: the paper's Algorithm 1 and its asynchronous form (section 5.2), an SPS table, past rounds. Refuses to know:
tokens, probabilities, clocks (what a step took is told by `timed`).

A round that drafts for R requests beside `plain` others yields R + plain + (sum of the admitted survivals) tokens and
takes draft_ms(R) + target_ms(R + plain + K) with K admitted draft tokens: throughput Theta(K). Prompt tokens in the
step have to be fed in some round anyhow, so they shift the place on the cost curve and cost nothing themselves.

Legend: R requests with a draft, G block size, K admitted draft tokens, P pooled past blocks.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy import ndarray

from engines.sps import STEP, Sps

from .schedule import RoundLoad, RoundState, Scheduler

POOL, POOL_OF_PROBES = 24, 6  # past blocks that a budget is searched on, at least; while the draft is skipped
PATIENCE = 0.3  # rounds' worth of loss until the draft is skipped
HIGH = 1.02  # gain over plain decoding from which it is taken up again
PROBE = 2  # requests that a probe drafts for
FIRST_WAIT, LONGEST_WAIT = 4, 64  # rounds between two probes; doubled after each that does not pay
COST = 0.004  # share of the time that probes may cost
FIRST_AUDIT, LONGEST_AUDIT = 12, 256  # rounds with a draft between two plain ones that check the table; doubled each time
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

    def costs(self, R: int, plain: int, prefill: int, context: float, most: int) -> tuple[ndarray, float]:
        """([most + 1] ms of a round that drafts for R and verifies 0 .. most draft tokens, ms of the plain round)."""
        rows = R + plain
        curve = self.sps.curve(rows, rows + prefill + most, context)
        target = curve[rows + prefill : rows + prefill + most + 1]
        if prefill:
            target = target + (curve[rows] - curve[rows + prefill])
        drafted = (target + self.sps.draft_ms(R, context)) * self.speed[True]
        return drafted, float(curve[rows]) * self.speed[False]

    def algorithm1(self, ordered: ndarray, state: RoundState, costs: ndarray) -> int:
        """K: the first candidate of `ordered` [n] (survivals, descending) that does not raise Theta ends the search."""
        theta = np.empty(len(ordered) + 1)
        theta[0] = len(state.confidence) + state.plain
        np.cumsum(ordered, out=theta[1:])
        theta[1:] += theta[0]
        theta /= costs
        return _first(theta[1:] <= theta[:-1])

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
        R, n = len(survival), survival.size
        if not n:
            return np.zeros(R, np.int64)
        costs, _ = self.costs(R, state.plain, state.prefill, float(state.context.mean()), n)
        ordered = descending(survival)
        return top_k(survival, min(self.algorithm1(ordered, state, costs), state.room), ordered)


class Lagged(LoadAware):
    """The budget comes from an unconstrained search over the survivals of two rounds before and older (section 5.2),
    scaled to today's number of requests; today's candidates are admitted in the order of their survival, ties by
    (slot, row), as long as each is worth its price.

    The search gives the best throughput Theta and its budget B, a mean that need not be whole. Candidate i of today's
    order is admitted while its survival is at least Theta times the mean cost of a token between i and B. Where the cost
    is flat up to B and steep behind it, that is the paper's rule, the top B. Where every token costs the same, a lone
    request with a sure block gets more than B and one with an unsure block less, and their mean is B. Theta, B and the
    costs are known before the round's first token is drawn, and candidate i is judged by its own survival alone, so
    nothing leaks from a token into the decision to verify it. The first two rounds, which have nothing to look back on,
    use Algorithm 1.

    Where the search finds no budget that beats plain decoding, the draft itself is skipped, once that has cost PATIENCE
    rounds; then a few requests are drafted for now and then, the rarer the longer it does not pay (FIRST_WAIT to
    LONGEST_WAIT rounds, never over COST of the time), and soon again after one whose blocks would have paid. A table that
    is wrong is corrected by what rounds really take, which needs a plain round now and then while the draft pays.
    """

    def __init__(self, sps: Sps):
        super().__init__(sps)
        self._pool: deque[ndarray] = deque()  # descending survivals [R*G] of rounds with a draft, without the newest
        self._pooled = 0
        self._last: ndarray | None = None  # the newest
        self._gained: ndarray | None = None  # [P*G + 1]: sums of the pool's 0, 1, .. largest survivals
        self._skipping, self._loss, self._wait, self._since = False, 0.0, FIRST_WAIT, 0
        self._drafted, self._audit = 0, FIRST_AUDIT
        self._bias = [8.0, 8.0]  # decayed: tokens accepted, tokens that the survivals had promised
        self._promised = 0.0
        self._found: tuple | None = None  # the last search and its load
        self.probing = self._paused = False

    def idle(self) -> None:
        self._last = None

    # -- whether to draft --------------------------------------------------------------------------------------------

    def draft(self, load: RoundLoad) -> int:
        R, self.probing, self._paused = load.requests, False, self._skipping
        self.expect(True, None)
        self._found = None
        if not R or self._gained is None:
            return R
        gain = self._search(load.requests, load.plain, load.prefill, load.context)[0]
        if not self._skipping:
            self._loss = max(self._loss + 1.0 - gain, 0.0)
            if self._loss < PATIENCE:
                return 0 if self._audited(load) else R
            self._skipping, self._wait, self._since = True, FIRST_WAIT, 0
        elif gain > HIGH:
            self._skipping, self._loss = False, 0.0
            return R
        self._since += 1
        if self._since < self._wait:
            self._expect_plain(load)
            return 0
        few, self.probing = min(R, PROBE), True
        lost = 1.0 - self._search(few, R - few + load.plain, load.prefill, load.context)[0]  # rounds' worth
        self._since, self._wait = 0, int(min(2 * self._wait, max(lost / COST, FIRST_WAIT), LONGEST_WAIT))
        return few

    def _audited(self, load: RoundLoad) -> bool:
        """This round is done without a draft, only to see what that takes."""
        self._drafted += 1
        if self._drafted < self._audit or load.prefill:
            return False
        self._drafted, self._audit = 0, min(2 * self._audit, LONGEST_AUDIT)
        self._expect_plain(load)
        return True

    def _expect_plain(self, load: RoundLoad) -> None:
        rows = load.requests + load.plain
        self.expect(False, None if load.prefill else float(self.sps.curve(rows, rows, load.context)[rows]))

    def _pays(self, ordered: ndarray, state: RoundState) -> bool:
        """Whether these blocks, if all requests had such ones, would beat plain decoding."""
        R = len(state.confidence)
        costs, plain_ms = self.costs(R, 0, 0, float(state.context.mean()), len(ordered))
        return float(((R + np.cumsum(ordered)) / costs[1:]).max()) * plain_ms > HIGH * R

    def _search(self, R: int, plain: int, prefill: int, context: float) -> tuple[float, float, float, ndarray]:
        """(best expected Theta over the plain round's, that Theta per unit of survival, its budget B, costs [R*G + 1])."""
        key = R, plain, prefill, int(context / STEP + 0.5)
        if self._found is not None and self._found[0] == key:  # `draft` has asked just before `lengths`
            return self._found[1]
        P, G = self._pooled, self._G
        costs, plain_ms = self.costs(R, plain, prefill, context, R * G)
        at = np.arange(P * G + 1) * (R / P)
        spent = costs if P == R else np.interp(at, np.arange(R * G + 1), costs)
        bias = min(max(self._bias[0] / self._bias[1], 0.5), 1.5)
        theta = (self._gained * (bias * R / P) + (R + plain)) / spent
        best = int(theta.argmax())
        found = float(theta[best]) * plain_ms / (R + plain), float(theta[best]) / bias, float(at[best]), costs
        self._found = key, found
        return found

    # -- how much to verify ------------------------------------------------------------------------------------------

    def lengths(self, state: RoundState) -> ndarray:
        survival = self.survival(state)
        R, self._G = survival.shape
        if not R:
            return np.zeros(0, np.int64)
        context, ordered = float(state.context.mean()), descending(survival)
        if self._gained is None:
            costs, _ = self.costs(R, state.plain, state.prefill, context, survival.size)
            K = self.algorithm1(ordered, state, costs)
        else:
            _, theta, budget, costs = self._search(R, state.plain, state.prefill, context)
            K = affordable(ordered, theta, budget, costs)
        K = min(K, state.room)
        if self.probing and self._pays(ordered, state):
            self._wait = FIRST_WAIT  # look again soon: the next probes tell luck from a change of traffic
        self._promised = float(ordered[:K].sum())
        # After a pause the draft has context to catch up with, which the table knows nothing of.
        unlike = state.prefill or self.probing or self._paused
        self.expect(True, None if unlike else float(costs[K]) / self.speed[True])
        self._remember(ordered)
        return top_k(survival, K, ordered)

    def _remember(self, ordered: ndarray) -> None:
        if self._last is not None:
            G = self._G
            self._pool.append(self._last)
            self._pooled += len(self._last) // G
            most = POOL_OF_PROBES if self._skipping else POOL
            while self._pooled - len(self._pool[0]) // G >= most:
                self._pooled -= len(self._pool.popleft()) // G
            merged = self._pool[0] if len(self._pool) == 1 else descending(np.concatenate(self._pool))
            self._gained = np.zeros(len(merged) + 1)
            np.cumsum(merged, out=self._gained[1:])
        self._last, self._found = ordered, None

    def observe(self, verified: ndarray, accepted: ndarray) -> None:
        super().observe(verified, accepted)
        if self.uses_confidence:
            accept, promise = self._bias
            self._bias = [0.98 * accept + float(accepted.sum()), 0.98 * promise + self._promised]


def affordable(ordered: ndarray, theta: float, budget: float, costs: ndarray) -> int:
    """K: how many of today's candidates `ordered` [n] (survivals, descending) are worth it, one after the other.

    Candidate i costs theta times the mean of costs [n + 1] between i and the budget, counted in whole tokens.
    """
    n = len(ordered)
    B = min(int(budget + 0.5), n)
    at = np.arange(n)
    price = np.empty(n)
    price[:B] = (costs[B] - costs[:B]) / (B - at[:B])
    price[B:] = (costs[B + 1 :] - costs[B]) / (at[B:] + 1 - B)
    return _first(ordered < theta * price)


def _first(failed: ndarray) -> int:
    """Index of the first True, or how many there are."""
    at = int(failed.argmax())
    return at if failed[at] else len(failed)
