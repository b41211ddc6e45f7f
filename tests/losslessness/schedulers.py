"""Schedulers of the tests: wrong ones, ones that turn a hidden reuse of randomness into a bias, one for each row alone.

Knows: decoding.schedule's interface. Refuses to know: engines.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import numpy as np
from numpy import ndarray

from decoding.schedule import Scheduler

APPENDIX_A = {1: 1.0, 2: 0.5, 3: 0.45}  # the paper's steps per second against batch tokens, for one request


class Retrospective(Scheduler):
    """WRONG, the paper's Appendix A: the argmax of expected throughput over the SAME round's survivals, each request by
    itself. speeds [G+1]: steps per second with 0 .. G draft tokens."""

    def __init__(self, speeds: list[float]):
        self.speeds = np.array(speeds)

    def lengths(self, state) -> ndarray:
        expected = np.concatenate([np.ones((len(state.survival), 1)), 1 + np.cumsum(state.survival, axis=1)], axis=1)
        return (expected[:, : len(self.speeds)] * self.speeds).argmax(axis=1).astype(np.int64)


class LooksAhead(Scheduler):
    """WRONG: verifies up to the slot with the highest confidence of all."""

    def lengths(self, state) -> ndarray:
        return state.confidence.argmax(axis=1)


class Alone(Scheduler):
    """Every row has a scheduler of its own, which sees a batch of one: one request's behaviour, hundreds at a time. A
    row that its scheduler does not want to draft for is drafted (the loop batches) and not verified."""

    def __init__(self, make: Callable[[], object], rows: int):
        self.each = [make() for _ in range(rows)]
        self.drafting, self.admitted = [True] * rows, 0

    def draft(self, load) -> int:
        one = replace(load, requests=1)
        self.drafting = [s.draft(one) > 0 for s in self.each[: load.requests]]
        return load.requests

    def lengths(self, state) -> ndarray:
        parts = ("confidence", "threshold")
        found = np.zeros(len(state.confidence), np.int64)
        for r, (scheduler, wanted) in enumerate(zip(self.each, self.drafting)):
            if wanted and r < len(found):
                found[r] = scheduler.lengths(replace(state, **{k: getattr(state, k)[r : r + 1] for k in parts}))[0]
        self.admitted += int(found.sum())
        return found

    def observe(self, verified: ndarray, accepted: ndarray) -> None:
        for r, (scheduler, wanted) in enumerate(zip(self.each, self.drafting)):
            if wanted and r < len(verified):
                scheduler.observe(verified[r : r + 1], accepted[r : r + 1])


class TwoRoundsAgo(Scheduler):
    """Right, if no draft uniform is ever used twice: each request verifies what would have been best for the survivals
    its row had two rounds before (an unconstrained argmax). speeds [G+1] as above; `rows`: at most so many requests."""

    def __init__(self, speeds: list[float], rows: int):
        self.best, self.history = Retrospective(speeds), [np.zeros(rows, np.int64)] * 2

    def lengths(self, state) -> ndarray:
        R = len(state.survival)
        now, self.history[0] = self.history[0][:R], self.history[1]
        self.history[1] = np.zeros_like(now, shape=self.history[0].shape)
        self.history[1][:R] = self.best.lengths(state)
        return now


class SkipsByTheLast(Scheduler):
    """Right under the same condition: every other round drafts and verifies nothing; the round after it drafts (and
    verifies one token) only if that unverified draft had a good end, here `slot`'s confidence over a half. One request
    a batch row; the loop drafts for all or none, so it is meant for one request at a time."""

    def __init__(self, slot: int):
        self.slot, self.looking, self.good = slot, True, False

    def draft(self, load) -> int:
        return load.requests if self.looking or self.good else self._skip()

    def _skip(self) -> int:
        self.looking = True
        return 0

    def lengths(self, state) -> ndarray:
        wanted = 0 if self.looking else 1
        self.good = bool(state.confidence[0, self.slot] > 0.5)
        self.looking = not self.looking
        return np.full(len(state.confidence), wanted, np.int64)
