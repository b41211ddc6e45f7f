"""Where a training run stands. Knows: the counts that are saved with the weights. Refuses to know: what is counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """`place` is the next batch of the epoch's order; best: the best held-out tau so far, waited: evaluations since."""

    step: int = 0
    epoch: int = 0
    place: int = 0
    blocks: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = 0.0
    waited: int = 0

    def judge(self, tau: float | None) -> bool:
        """Notes an evaluation's tau (None: nothing is held out). True: the best so far."""
        if tau is None:
            return False
        better = tau > self.best
        self.best, self.waited = max(self.best, tau), 0 if better else self.waited + 1
        return better
