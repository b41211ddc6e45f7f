"""Greedy verdicts of plain requests, on the host: what the verify graph says for a batch whose lists are all empty.

Knows: VerifyBatch. Refuses to know: sampling, filters, log-probs (the graph's). For logits in host memory: two passes over
a few rows, where a session's call costs more than its arithmetic (0.8 ms a round of one user behind a target pass).
"""

from __future__ import annotations

import numpy as np

from .base import VerifyBatch, VerifyResult

_NO_LISTS = np.zeros(0, bool), np.zeros(0, np.float32)


def is_plain(batch: VerifyBatch) -> bool:
    """No edits, filters, noise, draws or log-probs: the first four fields say all."""
    return not len(batch.wide_rows) and not len(batch.log_prob_rows)


def verify(batch: VerifyBatch) -> VerifyResult:
    """accepted: draft tokens up to the first that is not its row's argmax; next: the argmax behind them. The lowest token
    of equal logits, as the graph's ArgMax."""
    R, G = batch.draft_tokens.shape
    if not batch.num_draft.any():
        return VerifyResult(np.zeros(R, np.int64), batch.logits.argmax(axis=1)[batch.row_index[:, 0]], *_NO_LISTS)
    best = batch.logits.argmax(axis=1)[batch.row_index]  # [R, G+1]
    agree = (best[:, :G] == batch.draft_tokens) & (np.arange(G) < batch.num_draft[:, None])
    accepted = np.logical_and.accumulate(agree, axis=1).sum(axis=1)
    return VerifyResult(accepted, best[np.arange(R), accepted], *_NO_LISTS)
