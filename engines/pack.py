"""Packing: ragged per-request work into the index tensors of the target and backbone engines.

Knows: docs/structures.md's layouts. Refuses to know: requests, why a token is fed, what comes of it.

Legend: N packed tokens, R requests, Q padded query slots a request, C cache capacity, B slots of a block.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy import ndarray

from .arrays import concatenate
from .autoregressive import RowsBatch, pack_rows, steps_after
from .base import BackboneBatch, BackboneResult, MarkovBatch, TargetBatch
from .specs import DraftSpec

MANY = 64  # sizes whose constants are kept


def pack_target(
    tokens: list[list[int]],
    lengths: ndarray,
    logit_counts: ndarray,
    capacity: int,
    max_context: int,
    first_row: int = 0,
) -> tuple[TargetBatch, ndarray, ndarray]:
    """`tokens[r]` (may be empty) behind `lengths` [R] cached positions; logits wanted for the last
    `logit_counts` [R] of them.

    Returns (batch, starts [R]: packed row of each request's first token, logit_starts [R]: row of its first logits).
    Empty slots have pad_index 0 and write garbage behind a request's own tokens, which the next pass overwrites.
    """
    if all(len(t) == 1 for t in tokens) and all(logit_counts.tolist()):  # a token and a row of logits each: nothing to pad
        (rows, padded), positions = _neighbours(len(tokens)), lengths[:, None]
        batch = TargetBatch(
            token_ids=np.array([t for t, in tokens], np.int64),
            pad_index=padded,
            pack_index=rows,
            position_ids=np.minimum(positions, max_context - 1),
            write_index=lengths,
            mask=(_count(0, capacity) <= positions)[:, None, None],
            logit_rows=rows,
            first_row=first_row,
        )
        return batch, rows, rows
    if len(tokens) == 1:
        return _lone_target(tokens[0], lengths, logit_counts, capacity, max_context, first_row)
    counts = np.array([len(t) for t in tokens], np.int64)
    Q = int(counts.max())
    starts, slots = np.cumsum(counts) - counts, np.arange(Q)
    used = slots < counts[:, None]
    positions = lengths[:, None] + slots
    logit_starts = np.cumsum(logit_counts) - logit_counts
    last = (starts + counts - logit_counts).repeat(logit_counts)  # first logit row of each request, per logit row
    within = np.arange(int(logit_counts.sum())) - logit_starts.repeat(logit_counts)
    batch = TargetBatch(
        token_ids=np.array([t for row in tokens for t in row], np.int64),
        pad_index=np.where(used, starts[:, None] + slots, 0),
        pack_index=np.flatnonzero(used),
        position_ids=np.minimum(positions, max_context - 1),
        write_index=lengths,
        mask=(np.arange(capacity) <= positions[:, :, None])[:, None],
        logit_rows=last + within,
        first_row=first_row,
    )
    return batch, starts, logit_starts


def _lone_target(tokens: list[int], lengths: ndarray, logit_counts: ndarray, capacity: int, max_context: int, first_row: int):
    """pack_target of one request: nothing to pad, and few calls, since behind a target pass each takes 20 to 40 us."""
    n, length, wanted = len(tokens), int(lengths[0]), int(logit_counts[0])
    rows, none = _slots(n), _count(0, 1)
    batch = TargetBatch(
        token_ids=np.array(tokens, np.int64),
        pad_index=_slots_of_one(n),
        pack_index=rows,
        position_ids=_positions(length, n, max_context)[None],
        write_index=lengths,
        mask=(_count(0, capacity) <= _count(length, n)[:, None])[None, None],
        logit_rows=rows if wanted == n else _count(n - wanted, wanted),
        first_row=first_row,
    )
    return batch, none, none


def _count(first: int, n: int) -> ndarray:
    """first, first + 1, .. [n], read-only."""
    global _COUNT
    if first + n > len(_COUNT):
        _COUNT = np.arange(2 * (first + n))
        _COUNT.setflags(write=False)
    return _COUNT[first : first + n]


_COUNT = np.arange(0)


# Constants that an engine need not look at again (session.Binding.input): read-only, their memory their own.


@lru_cache(MANY)
def _slots(n: int) -> ndarray:
    """0 .. n - 1."""
    return _constant(np.arange(n))


@lru_cache(MANY)
def _slots_of_one(n: int) -> ndarray:
    """The same, [1, n]."""
    return _constant(np.arange(n).reshape(1, n).copy())


@lru_cache(MANY)
def _neighbours(R: int) -> tuple[ndarray, ndarray]:
    """0 .. R - 1 as [R] and [R, 1]."""
    return _constant(np.arange(R)), _constant(np.arange(R).reshape(R, 1).copy())


def _constant(array: ndarray) -> ndarray:
    array.setflags(write=False)
    return array


def _positions(first: int, n: int, max_context: int) -> ndarray:
    """The same, no more than max_context - 1."""
    positions = _count(first, n)
    return positions if first + n <= max_context else np.minimum(positions, max_context - 1)


def pack_backbone(
    features: list[list[ndarray]],
    counts: ndarray,
    lengths: ndarray,
    anchors: ndarray,
    B: int,
    capacity: int,
    max_context: int,
    first_row: int = 0,
) -> BackboneBatch:
    """New context `features[r]` (pieces [.., L*d], numpy's or a device's; `counts` [R] rows) behind `lengths` [R]
    injected positions, then the block of `anchors` [R] (token ids). A block sees all of its context and, in both
    directions, itself."""
    if len(anchors) == 1:
        return _lone_backbone(features[0], int(counts[0]), lengths, anchors, B, capacity, max_context, first_row)
    R, Q = len(anchors), int(counts.max()) + B
    F = int(counts.sum())
    starts, slots = np.cumsum(counts) - counts, np.arange(Q)
    block = slots - counts[:, None]  # slot within the block, where 0 <= block < B
    block_rows = F + np.arange(R)[:, None] * B + block
    pad_index = np.where(block < 0, starts[:, None] + slots, np.where(block < B, block_rows, 0))
    ends = lengths + counts  # the anchor's position
    return BackboneBatch(
        features=concatenate([piece for pieces in features for piece in pieces]),
        anchor_ids=anchors,
        pad_index=pad_index,
        position_ids=np.minimum(lengths[:, None] + slots, max_context - 1),
        block_position_ids=np.minimum(ends[:, None] + np.arange(B), max_context - 1),
        write_index=lengths,
        mask=np.broadcast_to((np.arange(capacity) < (ends + B)[:, None])[:, None, None], (R, 1, B, capacity)),
        first_row=first_row,
    )


def _lone_backbone(
    pieces: list[ndarray], count: int, lengths: ndarray, anchors: ndarray, B: int, capacity: int, max_context: int, first_row: int
) -> BackboneBatch:
    """pack_backbone of one request, as _lone_target."""
    length, Q = int(lengths[0]), count + B
    mask = np.empty((1, 1, B, capacity), bool)
    np.less(_count(0, capacity), length + Q, out=mask)
    return BackboneBatch(
        features=pieces[0] if len(pieces) == 1 else concatenate(pieces),
        anchor_ids=anchors,
        pad_index=_slots_of_one(Q),
        position_ids=_positions(length, Q, max_context)[None],
        block_position_ids=_positions(length + count, B, max_context)[None],
        write_index=lengths,
        mask=mask,
        first_row=first_row,
    )


def pack_draft(
    draft: DraftSpec,
    features: list[list[ndarray]],
    following: list[list[int]],
    counts: ndarray,
    lengths: ndarray,
    anchors: ndarray,
    capacity: int,
    max_context: int,
    first_row: int = 0,
) -> BackboneBatch | RowsBatch:
    """pack_backbone or pack_rows, whichever the draft takes. `following`: the token behind each row of new context."""
    at = capacity, max_context, first_row
    if draft.autoregressive:
        return pack_rows(features, following, counts, lengths, draft.depth, *at)
    return pack_backbone(features, counts, lengths, anchors, draft.block_slots, *at)


def draws_after(batch: BackboneBatch | RowsBatch, result: BackboneResult, draws: MarkovBatch) -> MarkovBatch:
    """What the markov engine takes behind the backbone's `result` of `batch`; draws: the same for a whole block."""
    return steps_after(batch, result, draws) if isinstance(batch, RowsBatch) else draws
