"""The five engines as an interface: what a backend must offer, in numpy.

Knows: the names, shapes and dtypes of docs/structures.md. Refuses to know: a runtime, a file, a request.

Legend: N packed tokens, R requests, Q padded query slots a request, C cache capacity, M rows with logits, V target
vocabulary, V_d draft vocabulary, G block size, d hidden size, L feature layers, r Markov rank, F packed feature rows,
Rs sampled requests. All index tensors are int64, all others float32 unless said otherwise.

Every array of a result is a view of its engine's output buffer: valid until the next call of the SAME engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy import ndarray

from .bundle import Bundle


@dataclass(frozen=True)
class TargetBatch:
    """token_ids [N], pad_index [R, Q] (packed row of each padded slot, 0 where empty), pack_index [N] (r*Q + j),
    position_ids [R, Q], write_index [R], mask [R, 1, Q, C] bool (True = attend; C = the engines' `target_capacity`),
    logit_rows [M] (packed rows). The R requests are those of the cache rows first_row .. first_row + R - 1."""

    token_ids: ndarray
    pad_index: ndarray
    pack_index: ndarray
    position_ids: ndarray
    write_index: ndarray
    mask: ndarray
    logit_rows: ndarray
    first_row: int = 0


@dataclass(frozen=True)
class TargetResult:
    """logits [M, V], features [N, L*d] (layer outputs in layer_ids order)."""

    logits: ndarray
    features: ndarray


@dataclass(frozen=True)
class BackboneBatch:
    """features [F, L*d] (new context), anchor_ids [R], pad_index [R, Q] (index into the F feature rows followed by the
    R*G block rows), position_ids [R, Q], block_position_ids [R, G], write_index [R], mask [R, 1, G, C] bool."""

    features: ndarray
    anchor_ids: ndarray
    pad_index: ndarray
    position_ids: ndarray
    block_position_ids: ndarray
    write_index: ndarray
    mask: ndarray


@dataclass(frozen=True)
class BackboneResult:
    """hidden [R, G, d] (after the final norm), base_logits [R, G, V_d]."""

    hidden: ndarray
    base_logits: ndarray


@dataclass(frozen=True)
class MarkovBatch:
    """hidden [R, G, d], base_logits [R, G, V_d], anchor_ids [R], temperature [R] (0 = greedy), uniforms [R, G]."""

    hidden: ndarray
    base_logits: ndarray
    anchor_ids: ndarray
    temperature: ndarray
    uniforms: ndarray


@dataclass(frozen=True)
class MarkovResult:
    """draft_tokens [R, G] (target ids), draft_indices [R, G] (draft ids), draft_probs [R, G, V_d],
    markov_embeddings [R, G, r] or None (rank 0)."""

    draft_tokens: ndarray
    draft_indices: ndarray
    draft_probs: ndarray
    markov_embeddings: ndarray | None = None


@dataclass(frozen=True)
class ConfidenceBatch:
    """hidden [R, G, d], markov_embeddings [R, G, r] (None where the graph has no such input)."""

    hidden: ndarray
    markov_embeddings: ndarray | None = None


@dataclass(frozen=True)
class ConfidenceResult:
    """confidence_logits [R, G], before the sigmoid."""

    confidence_logits: ndarray


@dataclass(frozen=True)
class VerifyBatch:
    """logits [M, V], row_index [R, G+1], draft_tokens [R, G], draft_indices [R, G], draft_probs [R, G, V_d],
    num_draft [R] (0..G), temperature [R], sample_index [Rs] (requests with temperature > 0), accept_uniforms [R, G],
    next_uniforms [R, G+1]."""

    logits: ndarray
    row_index: ndarray
    draft_tokens: ndarray
    draft_indices: ndarray
    draft_probs: ndarray
    num_draft: ndarray
    temperature: ndarray
    sample_index: ndarray
    accept_uniforms: ndarray
    next_uniforms: ndarray


@dataclass(frozen=True)
class VerifyResult:
    """accepted [R] (0..num_draft), next_tokens [R]."""

    accepted: ndarray
    next_tokens: ndarray


MASK_VALUES = {
    "float32": (np.float32(0), np.float32(-1e30)),
    "float16": (np.float16(0), np.float16(-3e4)),
}  # finite: a score plus the lowest float would overflow to -inf


class Engines(Protocol):
    """A loaded bundle. Not thread safe: one thread drives it.

    Cache row r of both caches belongs to active request r. `target_capacity` and `draft_capacity` are the C that the
    masks must have; they change only in `ensure_capacity`. write_index + Q <= C must hold in every call.
    """

    bundle: Bundle
    target_capacity: int
    draft_capacity: int

    def target(self, batch: TargetBatch) -> TargetResult: ...

    def backbone(self, batch: BackboneBatch) -> BackboneResult: ...

    def markov(self, batch: MarkovBatch) -> MarkovResult: ...

    def confidence(self, batch: ConfidenceBatch) -> ConfidenceResult: ...

    def verify(self, batch: VerifyBatch) -> VerifyResult: ...

    def ensure_capacity(self, rows: int, length: int) -> None:
        """Makes both caches hold `rows` requests of `length` positions; keeps what they hold (may also shrink them)."""

    def move_row(self, source: int, destination: int, target_length: int, draft_length: int) -> None:
        """Copies the first positions of one cache row over another (compaction when a request leaves)."""

    def close(self) -> None: ...


def additive_mask(mask: ndarray, dtype: str) -> ndarray:
    """A bool mask (True = attend) in the dtype the graph declares: bool as it is, else what is added to the scores."""
    if dtype == "bool":
        return mask
    return np.where(mask, *MASK_VALUES[dtype])
