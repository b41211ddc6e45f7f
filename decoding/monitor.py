"""The calibration monitor: is the survival that the draft predicts still the survival that the target shows?

Knows: predictions and verdicts of the recent past, by position. Refuses to know: schedulers, engines, who is told.

What is counted, and why it is unbiased. Position k of a block counts only when it was verified, as survived (accepted
>= k) or not. Whether it is verified is decided before its token x_k is drawn into the verdict: from confidences c_1 ..
c_k (functions of x_1 .. x_{k-1}), from other requests and from past rounds, never from x_k or the target's view of it
(the rule that keeps decoding lossless). So among the verified positions the mean outcome still is the mean chance of
survival, and a calibrated prediction shows no error. What the choice does change is the mix: under a scheduler the
low predictions are rarely verified, and the error is that of the predictions that were acted upon. The predictions are
those of the accept rule `rejection`; a rule that accepts less (`coupled`) shows as overconfidence.

Legend: G block size, K bins of predicted survival, R requests of a step.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy import ndarray

from .trace import RoundTrace

log = logging.getLogger(__name__)

BINS = 10
FLUSH = 32  # rounds are counted so many at a time
CLEAR = 0.75  # a warning ends when the error falls below this share of the bound


class CalibrationMonitor:
    """An observer of the loop: expected calibration error by position over an exponential window.

    block_size: G. bound: the error (0..1) from which `warning` speaks. window: rounds in which a verdict's weight falls
    to 1/e, counted in verified positions of that slot. minimum: verified positions of a slot (in weight) before it may
    warn. wants_confidence: run the confidence engine for the monitor alone (off: it watches where the scheduler asks
    anyway).
    """

    def __init__(
        self, block_size: int, *, bound: float = 0.08, window: float = 4096.0, minimum: float = 1024.0,
        wants_confidence: bool = False,
    ):  # fmt: skip
        if not 0.0 < bound < 1.0:
            raise ValueError(f"bound is {bound}; it must lie between 0 and 1.")
        if not 0.0 < minimum <= window / 2:
            raise ValueError(f"minimum is {minimum}; it must lie in 0..{window / 2:g}, half the window of {window:g}.")
        self.block_size, self.bound, self.window, self.minimum = block_size, bound, window, minimum
        self.wants_confidence = wants_confidence
        self._sums = np.zeros((3, block_size, BINS))  # weight, predicted survival, survivors
        self._slots = np.arange(block_size)
        self._warned = np.zeros(block_size, bool)
        self._error = np.full(block_size, np.nan)
        self._pending: list[tuple[ndarray, ndarray, ndarray]] = []
        self.warnings = 0

    def round(self, trace: RoundTrace) -> None:
        """Takes one step's verdicts; every FLUSH steps they are counted."""
        if trace.survival is None:
            return
        self._pending.append((trace.survival.copy(), trace.verified.copy(), trace.accepted.copy()))
        if len(self._pending) >= FLUSH:
            self.flush()

    def flush(self) -> None:
        """Counts what round() took; call it in the loop's thread, before reading the figures of a run that ended."""
        if not self._pending:
            return
        survival, verified, accepted = map(np.concatenate, zip(*self._pending))  # [rounds, G], [rounds], [rounds]
        self._pending = []
        seen = verified[:, None] > self._slots  # slot k was verified
        predicted = np.where(seen, survival, 0.0)  # rows without a draft hold nan
        survived = seen & (accepted[:, None] > self._slots)
        cell = np.minimum((predicted * BINS).astype(np.int64), BINS - 1) + self._slots * BINS
        shape = self._sums[0].shape
        sums = [np.bincount(cell.ravel(), w.ravel(), shape[0] * BINS) for w in (seen, predicted, survived)]
        fresh = np.stack(sums).reshape(3, *shape)
        counts = fresh[0].sum(axis=1)
        # A new array each time: a reader in another thread sees the old sums or the new ones.
        self._sums = self._sums * np.exp(-counts / self.window)[:, None] + fresh
        self._judge()

    def _judge(self) -> None:
        """Error and warnings: on above the bound, off below CLEAR of it, unchanged between and with too few
        verdicts."""
        weight = self.weight
        with np.errstate(invalid="ignore", divide="ignore"):
            self._error = np.abs(self._sums[1] - self._sums[2]).sum(axis=1) / weight
        known = weight >= self.minimum
        before = self._warned
        self._warned = np.where(
            known & (self._error > self.bound), True, before & ~(known & (self._error < CLEAR * self.bound))
        )
        if self._warned.any() and (self._warned & ~before).any():
            self.warnings += 1
            log.warning("%s", self.warning)

    @property
    def weight(self) -> ndarray:
        """[G] verified positions in the window (in weight)."""
        return self._sums[0].sum(axis=1)

    @property
    def error(self) -> ndarray:
        """[G] expected calibration error, nan where nothing was verified. It includes chance: about 0.8 of one standard
        deviation of an observed share, summed over the bins (1% to 2% in a full window)."""
        return self._error.copy()

    @property
    def predicted(self) -> ndarray:
        """[G] mean predicted survival of the verified positions, nan where there are none."""
        return self._mean(1)

    @property
    def observed(self) -> ndarray:
        """[G] share of the verified positions that survived, nan where there are none."""
        return self._mean(2)

    @property
    def warning(self) -> str | None:
        """One sentence on the worst position whose error passed the bound, None while there is none."""
        if not self._warned.any():
            return None
        k = int(np.argmax(np.where(self._warned, self._error, -1.0)))
        return (
            f"The confidence of draft position {k + 1} is off by {self._error[k]:.3f} (bound {self.bound:g}): "
            f"predicted survival {self.predicted[k]:.3f}, observed {self.observed[k]:.3f} over the last "
            f"{self.weight[k]:.0f} verified; calibrate the bundle on this traffic (make calibrate)."
        )

    def _mean(self, row: int) -> ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._sums[row].sum(axis=1) / self.weight
