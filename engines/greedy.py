"""Greedy verdicts of plain requests, on the host: what the verify graph says for a batch whose lists are all empty.

Knows: VerifyBatch. Refuses to know: sampling, filters, log-probs (the graph's). For logits in host memory: one pass over
a few rows, where a session's call costs more than its arithmetic (0.8 ms a round of one user behind a target pass).
"""

from __future__ import annotations

import numpy as np

from .base import VerifyBatch, VerifyResult

_NOTHING = np.zeros(0, bool), np.zeros(0, np.float32)


def is_plain(batch: VerifyBatch) -> bool:
    """No edits, filters, noise, draws or log-probs: the first four fields say all."""
    return not len(batch.wide_rows) and not len(batch.log_prob_rows)


def verify(batch: VerifyBatch) -> VerifyResult:
    """accepted: draft tokens up to the first that is not its row's argmax; next: the argmax behind them. The lowest token
    of equal logits, as the graph's ArgMax. A loop over few requests: behind a target pass the caches are cold, and each of
    numpy's calls takes 20 to 40 us."""
    best = batch.logits.argmax(axis=1).tolist()
    accepted, following = [], []
    for rows, draft, n in zip(batch.row_index.tolist(), batch.draft_tokens.tolist(), batch.num_draft.tolist()):
        a = 0
        while a < n and draft[a] == best[rows[a]]:
            a += 1
        accepted.append(a), following.append(best[rows[a]])
    ints = np.array([accepted, following], np.int64)
    return VerifyResult(ints[0], ints[1], *_NOTHING)
