"""Greedy verdicts of plain requests, on the host: what the verify graph says for a batch whose lists are all empty.

Knows: VerifyBatch. Refuses to know: sampling, filters, log-probs (the graph's). For logits in host memory: two passes over
a few rows, where a session's call costs more than its arithmetic (0.8 ms a round of one user behind a target pass).
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from .base import VerifyBatch, VerifyResult


def is_plain(batch: VerifyBatch) -> bool:
    """No edits, filters, noise, draws or log-probs: the first four fields say all."""
    return not len(batch.wide_rows) and not len(batch.log_prob_rows)


def verify(batch: VerifyBatch) -> VerifyResult:
    """accepted: draft tokens up to the first that is not its row's argmax; next: the argmax behind them. The lowest token
    of equal logits, as the graph's ArgMax."""
    R, G = batch.draft_tokens.shape
    best = batch.logits.argmax(axis=1)[batch.row_index]  # [R, G+1]
    agree = (best[:, :G] == batch.draft_tokens) & (np.arange(G) < batch.num_draft[:, None])
    accepted = np.logical_and.accumulate(agree, axis=1).sum(axis=1)
    return VerifyResult(accepted, best[np.arange(R), accepted], np.zeros(0, bool), np.zeros(0, np.float32))


def plain(logits: ndarray, starts: list[int], drafts: list[list[int]]) -> tuple[list[int], list[int]]:
    """(accepted, next tokens) of a round in which every request is plain, without a batch around it: drafts[r] are judged by
    the rows of logits [M, V] from starts[r] on. Behind a target pass the caches are cold, and numpy's calls take 20 to 40 us
    each, more than a few requests' loop."""
    best = logits.argmax(axis=1).tolist()
    accepted = []
    for start, draft in zip(starts, drafts):
        a = 0
        while a < len(draft) and draft[a] == best[start + a]:
            a += 1
        accepted.append(a)
    return accepted, [best[start + a] for start, a in zip(starts, accepted)]
