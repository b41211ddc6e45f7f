"""The default scheduler: budgets from past rounds, today's candidates by price, the draft skipped where it loses.

Knows: the asynchronous form of the paper's Algorithm 1 (section 5.2), an SPS table, past rounds. Refuses to know:
tokens, probabilities, clocks. Legend: schedule_aware.py's.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from engines.sps import STEP, Sps

from .schedule import RoundLoad, RoundState
from .schedule_aware import LoadAware, descending, first, top_k

POOL, POOL_OF_PROBES = 24, 6  # past blocks that a budget is searched on, at least; while the draft is skipped, for each probed
OLD = 2  # blocks of the pool that stay when the loop has run empty while the draft is skipped
NEW = 4  # rounds with a draft until the pool is searched again
# Rounds' worth of loss until the draft is skipped, with one request (shared by more), and at least: 24 blocks are a noisy witness.
PATIENCE, LEAST_PATIENCE = 1.0, 0.2
# Gain over plain decoding under which a round counts as a loss; and the draft is taken up again from 1 + LUCK / sqrt(blocks
# searched) on: the search's best is the luckiest of many, the more so the fewer blocks it saw.
LOW, LUCK = 1.02, 0.17
FRESH, ALIKE = 32, 8  # rounds without a draft for which one search holds, while the requests change by less than an eighth
PROBE, PROMISING = 2, 1.04  # requests that a probe drafts for; gain of their blocks that has the next one come soon
FIRST_WAIT, LONGEST_WAIT = 4, 64  # rounds between two probes; doubled after each that does not pay
POINTS = 512  # budgets that a search looks at, about: with more candidates every second, third, ..
MANY = 256  # survivals from which a pool is sorted in 16 bits (numpy's radix sort: a quarter of the time)
COST = 0.004  # share of the time at which probes stop becoming rarer
SHARE, SAVED = 0.006, 1.0  # of the time that probes may lose in all, as measured; rounds' worth that they may save up
FIRST_AUDIT, LONGEST_AUDIT = 12, 256  # rounds with a draft between two plain ones that check the table; it doubles


@dataclass(frozen=True)
class _Plan:
    """What a search found. gain: best expected Theta over the plain round's; theta: that Theta per unit of survival;
    budget B; depth: longest block; costs [R*depth + 1]: ms with 0, 1, .. draft tokens and that longest block."""

    gain: float
    theta: float
    budget: float
    depth: int
    costs: ndarray


class Lagged(LoadAware):
    """The budget comes from an unconstrained search over the survivals of two rounds before and older (section 5.2),
    scaled to today's number of requests; today's candidates are admitted in the order of their survival, ties by
    (slot, row), as long as each is worth its price.

    The search gives the best throughput Theta, its budget B, a mean that need not be whole, and the longest block q that
    it allows: where padded slots cost time, blocks of like lengths are cheaper. Candidate i of today's order, of those in
    the first q slots, is admitted while its survival is at least Theta times the mean cost of a token between i and B.
    Where the cost is flat up to B and steep behind it, that is the paper's rule, the top B. Where every token costs the
    same, a lone request with a sure block gets more than B and one with an unsure block less, and their mean is B.
    Theta, B, q and the costs are known before the round's first token is drawn, and candidate i is judged by its own
    survival alone, so nothing leaks from a token into the decision to verify it. The first two rounds, which have
    nothing to look back on, use Algorithm 1.

    Where the search finds no budget that beats plain decoding, the draft itself is skipped, once that has cost PATIENCE
    rounds (less with more requests); then a few requests are drafted for now and then, the rarer the longer it does not
    pay (FIRST_WAIT to LONGEST_WAIT rounds), and soon again after one whose blocks would have paid, as long as all of
    them together lose no more than SHARE of the time (one that gains pays for others). A table that is wrong is
    corrected by what rounds really take, which needs a plain round now and then while the draft pays.
    """

    def __init__(self, sps: Sps):
        super().__init__(sps)
        self._pool: deque[ndarray] = deque()  # survivals [R, G] of rounds with a draft, without the newest
        self._pooled = self._new = 0
        self._last: ndarray | None = None  # the newest
        self._gained: dict[bool, ndarray] = {}  # sums() of the pool, with and without depths, once they are asked for
        self._skipping, self._loss, self._wait, self._since = False, 0.0, FIRST_WAIT, 0
        self._drafted, self._audit, self._requests = 0, FIRST_AUDIT, 1
        self._bias = [8.0, 8.0]  # decayed: tokens accepted, tokens that the survivals had promised
        self._promised = 0.0
        self._found: tuple | None = None  # the last search and its load
        self._promised_for: tuple[int, int, float] | None = None  # requests, rounds without a draft until when, gain
        self.probing = self._paused = False
        self._saved, self._probe, self._got = SAVED, (0.0, 0.0, 0), 0  # (ms of a plain round, loss expected, rows)

    def idle(self) -> None:
        self._last = None
        if self._skipping:  # what comes next may be of another kind: look at once, and let few old blocks speak
            while self._pooled > OLD:
                self._pooled -= len(self._pool.popleft())
            self._found, self._gained, self._wait, self._since = None, {}, FIRST_WAIT, FIRST_WAIT
            self._promised_for = None

    # -- whether to draft --------------------------------------------------------------------------------------------

    def draft(self, load: RoundLoad) -> int:
        R, self.probing, self._paused = load.requests, False, self._skipping
        self._requests = max(R, 1)
        self.expect(True, None)
        if not R or not self._pool:
            return R
        gain = self._promise(load) if self._skipping else self._search(R, load.plain, load.prefill, load.context).gain
        if not self._skipping:
            self._loss = max(self._loss + LOW - gain, 0.0)
            if self._loss < max(PATIENCE / R, LEAST_PATIENCE):
                return 0 if self._audited(load) else R
            self._skipping, self._wait, self._since, self._promised_for = True, FIRST_WAIT, 0, None
        elif gain > 1.0 + LUCK / math.sqrt(self._pooled):
            self._skipping, self._loss = False, 0.0
            return R
        self._since += 1
        self._saved = min(self._saved + SHARE, SAVED)
        if self._since < self._wait or self._saved <= 0:
            self._expect_plain(load)
            return 0
        few, self.probing, self._promised_for = min(R, PROBE), True, None
        lost = 1.0 - self._search(few, R - few + load.plain, load.prefill, load.context).gain  # rounds' worth
        self._since, self._wait = 0, int(min(2 * self._wait, max(lost / COST, FIRST_WAIT), LONGEST_WAIT))
        rows = R + load.plain
        plain_ms = float(self.sps.curve(rows, rows, load.context)[rows]) * self.speed[False]
        self._saved, self._probe = self._saved - lost, (plain_ms, lost, rows)
        return few

    def timed(self, draft_ms: float, rest_ms: float) -> None:
        super().timed(draft_ms, rest_ms)
        if self.probing:  # what it cost indeed: the draft had context to catch up with
            plain_ms, expected, rows = self._probe
            self._saved += expected - ((draft_ms + rest_ms) / plain_ms - 1.0 - self._got / rows)

    def _promise(self, load: RoundLoad) -> float:
        """The gain of a search, at most FRESH rounds old: between two probes nothing new is learnt, and a search takes its share."""
        requests, until, gain = self._promised_for or (0, 0, 0.0)
        if self._since < until and ALIKE * abs(load.requests - requests) <= requests:
            return gain
        self._found = None  # rounds have corrected the table since
        gain = self._search(load.requests, load.plain, load.prefill, load.context).gain
        self._promised_for = load.requests, self._since + FRESH, gain
        return gain

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

    def _pays(self, survival: ndarray, state: RoundState) -> bool:
        """Whether these blocks [R, G], if all requests had such ones, would beat plain decoding."""
        R, n = len(survival), survival.size
        costs, plain_ms, slot_ms = self.costs(R, 0, 0, state.context, n)
        K = np.arange(n + 1)
        pads = slot_ms > 0
        theta = (sums(survival, pads) + R) / (costs + padding(slot_ms, R, survival.shape[1], K) if pads else costs)
        return float(theta.max()) * plain_ms > PROMISING * R

    def _search(self, R: int, plain: int, prefill: int, context: float) -> _Plan:
        key = R, plain, prefill, int(context / STEP + 0.5)
        if self._found is not None and self._found[0] == key:  # `draft` has asked just before `lengths`
            return self._found[1]
        P, G, rows = self._pooled, self._G, R + plain
        costs, plain_ms, slot_ms = self.costs(R, plain, prefill, context, R * G)
        stride = 1 + P * G // POINTS
        at = np.arange(0, P * G + 1, stride) * (R / P)
        spent = costs[::stride] if P == R else np.interp(at, np.arange(R * G + 1), costs)
        bias = min(max(self._bias[0] / self._bias[1], 0.5), 1.5)
        pads = slot_ms > 0  # a long block costs the short ones beside it something
        if pads not in self._gained:
            self._gained[pads] = sums(self._pool[0] if len(self._pool) == 1 else np.concatenate(self._pool), pads)
        theta = self._gained[pads][:, ::stride] * (bias * R / P) + rows
        theta /= spent + padding(slot_ms, rows, G, at) if pads else spent
        found, best = divmod(int(theta.argmax()), len(at))
        most, depth = float(theta[found, best]), found + 1 if pads else G
        if pads:
            costs = costs[: R * depth + 1] + slot_ms * (rows * depth - np.arange(R * depth + 1))
            costs[0] -= slot_ms * rows * depth
        plan = _Plan(most * plain_ms / rows, most / bias, float(at[best]), depth, costs)
        self._found = key, plan
        return plan

    # -- how much to verify ------------------------------------------------------------------------------------------

    def lengths(self, state: RoundState) -> ndarray:
        survival = self.survival(state)
        R, self._G = survival.shape
        if not R:
            return np.zeros(0, np.int64)
        shown = survival
        if not self._pool:
            ordered = descending(survival)
            K, costs = self.algorithm1(survival, ordered, state)
        else:
            plan = self._search(R, state.plain, state.prefill, state.context)
            if R == 1 and not self.probing:
                return self._lone(survival, plan, state)
            shown, costs = survival[:, : plan.depth], plan.costs
            ordered = descending(shown)
            K = affordable(ordered, plan.theta, plan.budget, costs)
        K = min(K, state.room)
        if self.probing and self._pays(survival, state):
            self._wait = FIRST_WAIT  # look again soon: the next probes tell luck from a change of traffic
        self._promised = float(ordered[:K].sum())
        lengths = top_k(shown, K, ordered)
        # After a pause the draft has context to catch up with, which the table knows nothing of.
        unlike = state.prefill or self.probing or self._paused
        self.expect(True, None if unlike else self._takes(R, state, int(lengths.sum()), int(lengths.max())))
        self._remember(survival)
        return lengths

    def _lone(self, survival: ndarray, plan: _Plan, state: RoundState) -> ndarray:
        """`lengths` of one request, in numbers: its survivals are in order as they are, and behind a target pass a numpy
        call takes 20 to 40 us."""
        shown = survival[0, : plan.depth].tolist()
        K = min(affordable_few(shown, plan.theta, plan.budget, plan.costs.tolist()), state.room, sum(s > 0 for s in shown))
        self._promised = sum(shown[:K])
        unlike = state.prefill or self._paused
        self.expect(True, None if unlike else self._takes(1, state, K, K))
        self._remember(survival)
        return np.array([K], np.int64)

    def _takes(self, R: int, state: RoundState, K: int, most: int) -> float:
        """ms of a round that verifies K draft tokens, `most` of one block, by the table."""
        rows = R + state.plain
        target = float(self.sps.curve(rows, rows + K, state.context)[rows + K])
        slots = rows * most - K
        return target + self.sps.others(R, state.context)[0] + slots * self.sps.others(rows, state.context)[1]

    def _remember(self, survival: ndarray) -> None:
        if self._last is not None:
            self._pool.append(self._last)
            self._pooled += len(self._last)
            self._new += len(self._last)
            most = POOL_OF_PROBES * min(self._requests, PROBE) if self._skipping else POOL
            while self._pooled - len(self._pool[0]) >= most:
                self._pooled -= len(self._pool.popleft())
            self._gained = {}
        self._last = survival
        if self._new >= NEW * len(survival) or self._pooled < POOL_OF_PROBES:
            self._found, self._new = None, 0

    def observe(self, verified: ndarray, accepted: ndarray) -> None:
        super().observe(verified, accepted)
        self._got = int(accepted.sum())
        if self.uses_confidence:
            accept, promise = self._bias
            self._bias = [0.98 * accept + self._got, 0.98 * promise + self._promised]


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
    return first(ordered < theta * price)


def affordable_few(ordered: list[float], theta: float, budget: float, costs: list[float]) -> int:
    """affordable, of a few candidates."""
    B = min(int(budget + 0.5), len(ordered))
    for i, survival in enumerate(ordered):
        mean = (costs[B] - costs[i]) / (B - i) if i < B else (costs[i + 1] - costs[B]) / (i + 1 - B)
        if survival < theta * mean:
            return i
    return len(ordered)


def sums(survival: ndarray, depths: bool) -> ndarray:
    """[D, P*G + 1]: the sum of the 0, 1, .. largest of `survival` [P, G] within the first d slots, d = 1 .. G
    (`depths`), or d = G alone; what lies behind slot d counts as 0."""
    (P, G), n = survival.shape, survival.size
    many = n > MANY
    allowed = (survival * 65535).astype(np.uint16).reshape(1, n) if many else -survival.reshape(1, n)
    if depths:
        allowed = allowed * (np.arange(n) % G < np.arange(1, G + 1)[:, None])
    made = np.zeros((len(allowed), n + 1))
    allowed.sort(axis=1, kind="stable" if many else None)
    np.cumsum(allowed[:, ::-1] if many else allowed, axis=1, out=made[:, 1:])
    made *= 1 / 65535 if many else -1.0
    return made


def padding(slot_ms: float, rows: int, G: int, K: ndarray) -> ndarray:
    """[G, len(K)]: ms of the padded slots with K = 0, .. draft tokens in all and a longest block of d = 1 .. G; none
    with K = 0."""
    slots = slot_ms * rows * np.arange(1, G + 1)[:, None] - slot_ms * K
    np.maximum(slots, 0.0, out=slots)
    slots[:, 0] = 0.0
    return slots
