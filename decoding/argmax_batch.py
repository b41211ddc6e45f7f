"""The verify engine's batch of requests that want their argmax alone, which most rounds consist of.

Knows: which row of logits judges which slot. Refuses to know: sampling, edits, log-probs (judge.py). Few calls: behind a target
pass the caches are cold, and one of numpy's takes 20 to 40 us, whatever it computes.

Legend: R requests of this pass, G block size, n admitted draft tokens, M rows of logits, V / V_d target / draft vocabulary.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy import ndarray

from engines.base import VerifyBatch

from .drafter import Draft


def argmax_batch(
    logits: ndarray, starts: list[int], counts: list[int], draft: Draft | None, first_row: int, num_draft: ndarray, G: int, V_d: int
) -> VerifyBatch:
    """logits [M, V]: counts [R] rows of each request (n + 1) from starts [R] on; first_row: the cache row of the first.

    What lies behind a request's own n draft tokens means nothing."""
    R, blocks = len(counts), None if draft is None else draft.block.draft_tokens
    if blocks is None:
        tokens = no_tokens(R, G)
    elif draft.first_row == first_row and len(blocks) == R:
        tokens = blocks
    else:
        each = [draft.tokens(first_row + i, n - 1) if n > 1 else [] for i, n in enumerate(counts)]
        tokens = np.array([own + [0] * (G - len(own)) for own in each])
    if R == 1:
        rows = rows_of_one(counts[0], G)
    elif len(logits) == R:
        rows = rows_of_each(R, G)
    else:
        slots = range(G + 1)
        rows = np.array([[start + min(k, n - 1) for k in slots] for start, n in zip(starts, counts)])
    return VerifyBatch.greedy(logits, rows, tokens, num_draft, V_d)


@cache
def no_tokens(R: int, G: int) -> ndarray:
    return fixed(np.zeros((R, G), np.int64))


@cache
def rows_of_one(count: int, G: int) -> ndarray:
    """[1, G + 1]: the rows of a lone request's slots, `count` of them its own."""
    return fixed(np.minimum(np.arange(G + 1), count - 1)[None])


@cache
def rows_of_each(R: int, G: int) -> ndarray:
    """[R, G + 1] of requests with a row each."""
    return fixed(np.repeat(np.arange(R)[:, None], G + 1, axis=1))


def fixed(array: ndarray) -> ndarray:
    array.setflags(write=False)
    return array
