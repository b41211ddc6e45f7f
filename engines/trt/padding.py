"""Batches widened to sizes that come again, so that a launch recorded for them serves many rounds.

Knows: what an empty slot, row or token of docs/structures.md may hold without changing any other. Refuses to know:
devices, graphs. Requests are never added: a row behind the active ones may be another request's.

Legend: N packed tokens, R requests, Q padded slots a request, C cache positions, M rows with logits, F feature rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy import ndarray

from ..arrays import Rows
from ..autoregressive import RowsBatch
from ..base import BackboneBatch, TargetBatch
from .profiles import Profile

EXACT_POWERS = 8


def wider(size: int, most: int) -> int:
    """The next size that launches are recorded for: powers of two to 8, then a quarter of a power of two apart, `most`
    at most. 0 stays 0."""
    step = 1 << max(size.bit_length() - 3, 0)
    up = -(-size // step) * step if size > EXACT_POWERS else 1 << max(size - 1, 0).bit_length()
    return min(up, most) if size else 0


def pad_target(batch: TargetBatch, profile: Profile) -> TargetBatch:
    """Wider N, Q and M within the profile. More slots write garbage behind a request's own tokens, more tokens read
    slot 0, more logits are token 0's."""
    N, (R, Q), M = len(batch.token_ids), batch.pad_index.shape, len(batch.logit_rows)
    most = {symbol: high for symbol, (_, _, high) in profile.sizes.items()}
    slots = wider(Q, most["Q"])
    tokens = N if N == R * slots else min(wider(N, most["N"]), R * slots)
    rows = tokens if M == N else wider(M, most["M"])
    return replace(
        batch,
        token_ids=longer(batch.token_ids, tokens),
        pad_index=longer(batch.pad_index, slots, 1),
        pack_index=longer(batch.pack_index // Q * slots + batch.pack_index % Q, tokens),
        position_ids=longer(batch.position_ids, slots, 1),
        mask=longer(batch.mask, slots, 2),
        logit_rows=longer(batch.logit_rows, rows),
    )


def pad_backbone(batch: BackboneBatch, profile: Profile) -> BackboneBatch:
    """Wider F and Q within the profile. More feature rows hold anything and are read by no slot; the block's rows,
    which come behind them, move."""
    F, Q = len(batch.features), batch.pad_index.shape[1]
    rows = wider(max(F, 1), profile.sizes["F"][2])
    slots = wider(Q, profile.sizes["Q"][2])
    pieces = batch.features.pieces if isinstance(batch.features, Rows) else [batch.features]
    return replace(
        batch,
        features=Rows(pieces, rows),
        pad_index=longer(np.where(batch.pad_index < F, batch.pad_index, batch.pad_index + rows - F), slots, 1),
        position_ids=longer(batch.position_ids, slots, 1),
    )


def pad_rows(batch: RowsBatch, profile: Profile) -> RowsBatch:
    """Wider F and Q within the profile. More rows hold anything and are read by no slot, more slots write garbage
    behind a request's own rows."""
    F, Q = len(batch.features), batch.pad_index.shape[1]
    rows, slots = wider(F, profile.sizes["F"][2]), wider(Q, profile.sizes["Q"][2])
    pieces = batch.features.pieces if isinstance(batch.features, Rows) else [batch.features]
    return replace(
        batch,
        features=Rows(pieces, rows),
        next_ids=longer(batch.next_ids, rows),
        pad_index=longer(batch.pad_index, slots, 1),
        pack_index=longer(batch.pack_index // Q * slots + batch.pack_index % Q, rows),
        position_ids=longer(batch.position_ids, slots, 1),
        mask_rows=None if batch.mask_rows is None else longer(batch.mask_rows, slots, 2),
    )


def longer(array: ndarray, size: int, axis: int = 0) -> ndarray:
    """Zeros (False) behind the array along an axis."""
    more = size - array.shape[axis]
    if not more:
        return array
    return np.concatenate([array, np.zeros((*array.shape[:axis], more, *array.shape[axis + 1 :]), array.dtype)], axis)
