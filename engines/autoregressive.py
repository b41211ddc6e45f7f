"""What an autoregressive draft (EAGLE-3, MTP) takes in place of a block: the rows of new context, then the steps.

Knows: docs/structures.md's layouts of its backbone and markov engines, how ragged work is packed into them. Refuses to
know: requests, runtimes, what comes of a draft. A row at position i pairs the target's features of position i with the
token at i+1.

Legend: F packed feature rows, R requests, Q padded slots a request, C cache capacity, G block size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from .arrays import concatenate
from .base import BackboneResult, MarkovBatch


@dataclass(frozen=True)
class RowsBatch:
    """features [F, L*d] (new context), next_ids [F] (the token behind each row), pad_index [R, Q] (packed row of each
    slot, 0 where empty), pack_index [F] (r*Q + j), position_ids [R, Q], write_index [R], last_index [R] (packed row of
    the request's newest), last_position_ids [R, 1] (p-1), mask [R, 1, 1, C] bool (the newest row's), mask_rows
    [R, 1, Q, C] bool (None for a draft of one layer, whose other rows attend nothing). The R requests are those of the
    cache rows first_row .. first_row + R - 1. A request without new rows gets garbage, behind its own."""

    features: ndarray
    next_ids: ndarray
    pad_index: ndarray
    pack_index: ndarray
    position_ids: ndarray
    write_index: ndarray
    last_index: ndarray
    last_position_ids: ndarray
    mask: ndarray
    mask_rows: ndarray | None = None
    first_row: int = 0


@dataclass(frozen=True)
class StepsBatch(MarkovBatch):
    """A MarkovBatch with hidden [R, 1, d] (before the final norm) and base_logits [R, 1, V_d] of the newest rows, and
    what the steps attend: position_ids [R] (p, of the first step), mask [R, 1, 1, C] bool (the cached rows 0..p-1),
    the caches of the rows from first_row on, which are only read."""

    position_ids: ndarray
    mask: ndarray
    first_row: int = 0


def pack_rows(
    features: list[list[ndarray]],
    following: list[list[int]],
    counts: ndarray,
    lengths: ndarray,
    depth: int,
    capacity: int,
    max_context: int,
    first_row: int = 0,
) -> RowsBatch:
    """New context `features[r]` (pieces [.., L*d], numpy's or a device's; `counts` [R] rows) with the token `following`
    each row, behind `lengths` [R] cached rows. depth: of the draft."""
    Q = max(int(counts.max()), 1)
    starts, slots, ends = np.cumsum(counts) - counts, np.arange(Q), lengths + counts
    used, positions = slots < counts[:, None], lengths[:, None] + slots
    newest = np.maximum(ends - 1, 0)
    seen = lambda at: (np.arange(capacity) <= at[..., None])[:, None]
    return RowsBatch(
        features=concatenate([piece for pieces in features for piece in pieces]),
        next_ids=np.array([token for tokens in following for token in tokens], np.int64),
        pad_index=np.where(used, starts[:, None] + slots, 0),
        pack_index=np.flatnonzero(used),
        position_ids=np.minimum(positions, max_context - 1),
        write_index=lengths,
        last_index=np.where(counts > 0, starts + counts - 1, 0),
        last_position_ids=np.minimum(newest, max_context - 1)[:, None],
        mask=seen(newest[:, None]),
        mask_rows=seen(positions) if depth > 1 else None,
        first_row=first_row,
    )


def steps_after(rows: RowsBatch, newest: BackboneResult, draws: MarkovBatch) -> StepsBatch:
    """The steps behind the rows of `rows`, whose result is `newest`; draws: who picks how."""
    return StepsBatch(
        **{**draws.__dict__, "hidden": newest.hidden, "base_logits": newest.base_logits},
        position_ids=rows.last_position_ids[:, 0] + 1,
        mask=rows.mask,
        first_row=rows.first_row,
    )
