"""The five engines as an interface: what a backend must offer, in numpy.

Knows: the names, shapes and dtypes of docs/structures.md. Refuses to know: a runtime, a file, a request.

Legend: N packed tokens, R requests, Q padded query slots a request, C cache capacity, M rows with logits, V target
vocabulary, V_d draft vocabulary, G block size, d hidden size, L feature layers, r Markov rank, F packed feature rows,
Rs requests that draw. All index tensors are int64, all others float32 unless said otherwise.

Every array of a result is a view of its engine's output buffer: valid until the next call of the SAME engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
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
    """logits [M, V], features [N, L*d] (layer outputs in layer_ids order). lasting: the features are the caller's to keep, later
    calls leave them as they are."""

    logits: ndarray
    features: ndarray
    lasting: bool = False


@dataclass(frozen=True)
class BackboneBatch:
    """features [F, L*d] (new context), anchor_ids [R], pad_index [R, Q] (index into the F feature rows followed by the
    R*G block rows), position_ids [R, Q], block_position_ids [R, G], write_index [R], mask [R, 1, G, C] bool. The R
    requests are those of the cache rows first_row .. first_row + R - 1."""

    features: ndarray
    anchor_ids: ndarray
    pad_index: ndarray
    position_ids: ndarray
    block_position_ids: ndarray
    write_index: ndarray
    mask: ndarray
    first_row: int = 0


@dataclass(frozen=True)
class BackboneResult:
    """hidden [R, G, d] (after the final norm), base_logits [R, G, V_d]."""

    hidden: ndarray
    base_logits: ndarray


@dataclass(frozen=True)
class MarkovBatch:
    """hidden [R, G, d], base_logits [R, G, V_d], anchor_ids [R]. A draft token is the argmax, except for the requests
    of sample_index [Rs] (temperature [Rs] > 0, uniforms [Rs, G]: drawn) and of match_index [Rc] (match_temperature [Rc]
    > 0, noise [Rc, G, V]: argmax of logits / temperature + noise)."""

    hidden: ndarray
    base_logits: ndarray
    anchor_ids: ndarray
    sample_index: ndarray
    temperature: ndarray
    uniforms: ndarray
    match_index: ndarray
    match_temperature: ndarray
    noise: ndarray

    @classmethod
    def greedy(
        cls, hidden: ndarray, base_logits: ndarray, anchor_ids: ndarray, vocab_size: int, block_size: int | None = None
    ) -> MarkovBatch:
        """Nothing drawn, nothing matched. vocab_size: V; block_size: G, where base_logits do not show it."""
        return cls(hidden, base_logits, anchor_ids, *_no_draws(block_size or base_logits.shape[1], vocab_size))


@dataclass(frozen=True)
class MarkovResult:
    """draft_tokens [R, G] (target ids), draft_indices [R, G] (draft ids), draft_probs [Rs, G, V_d] (of the requests of
    sample_index only), markov_embeddings [R, G, r] or None (rank 0)."""

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
    """logits [M, V]; row_index [R, G+1] (row of each slot, padded by repeating the request's last), draft_tokens [R,
    G], num_draft [R] (n, 0..G): enough for greedy requests. Whatever else is wanted is listed, and every list may be
    empty:

    wide rows (edited, drawn or matched): wide_rows [Mw] (rows of logits), temperature [Mw] (1 for a greedy row);
    edits l -> (l / scale if l > 0 else l * scale) + add: edit_at [E, 2] (wide row, token; each pair once), edit_scale
    [E], edit_add [E]; filters: filter_rows [Mf] (wide rows), top_k [Mf] int64 (V = off), top_p [Mf] (1 = off), min_p
    [Mf] (0 = off), top_count [1] int64: how many of a row's largest probabilities are looked at;
    matched rows (coupled: noise of the row's position; greedy with edits: zeros): match_rows [Mc] (wide rows),
    noise [Mc, V], match_filtered [Mx] (which of the Mc rows are in filter_rows too);
    requests of the rejection rule: sample_index [Rs] (requests), sample_rows [Rs, G+1] (wide rows, padded as
    row_index), draft_rows [Rs] (rows of draft_probs, any where n = 0), draft_indices [Rs, G], draft_probs [Rq, G, V_d]
    (Rq >= 1 if Rs >= 1), accept_uniforms [Rs, G], next_uniforms [Rs, G+1] (by the slot where the next token is drawn);
    log-probs: log_prob_rows [Ml] (rows of logits), log_prob_at [Ml, 2] (request, slot)."""

    logits: ndarray
    row_index: ndarray
    draft_tokens: ndarray
    num_draft: ndarray
    wide_rows: ndarray
    temperature: ndarray
    edit_at: ndarray
    edit_scale: ndarray
    edit_add: ndarray
    filter_rows: ndarray
    top_k: ndarray
    top_p: ndarray
    min_p: ndarray
    top_count: ndarray
    match_rows: ndarray
    noise: ndarray
    match_filtered: ndarray
    sample_index: ndarray
    sample_rows: ndarray
    draft_rows: ndarray
    draft_indices: ndarray
    draft_probs: ndarray
    accept_uniforms: ndarray
    next_uniforms: ndarray
    log_prob_rows: ndarray
    log_prob_at: ndarray

    @classmethod
    def greedy(
        cls, logits: ndarray, row_index: ndarray, draft_tokens: ndarray, num_draft: ndarray, draft_vocab_size: int
    ) -> VerifyBatch:
        """Every list empty. draft_vocab_size: V_d."""
        batch = object.__new__(cls)  # a frozen class sets its fields one by one, which takes a share of a short round
        batch.__dict__.update(_no_lists(draft_tokens.shape[1], logits.shape[1], draft_vocab_size))
        batch.__dict__.update(logits=logits, row_index=row_index, draft_tokens=draft_tokens, num_draft=num_draft)
        return batch


@cache
def _no_draws(G: int, V: int) -> tuple[ndarray, ...]:
    """What a MarkovBatch draws with, all empty; as _no_lists."""
    none, no_floats = np.zeros(0, np.int64), np.zeros(0, np.float32)
    made = none, no_floats, np.zeros((0, G), np.float32), none, no_floats, np.zeros((0, G, V), np.float32)
    for array in made:
        array.setflags(write=False)
    return made


@cache
def _no_lists(G: int, V: int, V_d: int) -> dict[str, ndarray]:
    """A VerifyBatch's lists, all empty; made once, since a round of one user is short. Read-only."""
    ints, floats = (lambda *shape: np.zeros(shape, np.int64)), (lambda *shape: np.zeros(shape, np.float32))
    lists = dict(
        wide_rows=ints(0), temperature=floats(0), edit_at=ints(0, 2), edit_scale=floats(0), edit_add=floats(0),
        filter_rows=ints(0), top_k=ints(0), top_p=floats(0), min_p=floats(0), top_count=np.ones(1, np.int64),
        match_rows=ints(0), noise=floats(0, V), match_filtered=ints(0),
        sample_index=ints(0), sample_rows=ints(0, G + 1), draft_rows=ints(0), draft_indices=ints(0, G),
        draft_probs=floats(1, G, V_d), accept_uniforms=floats(0, G), next_uniforms=floats(0, G + 1),
        log_prob_rows=ints(0), log_prob_at=ints(0, 2),
    )  # fmt: skip
    for array in lists.values():
        array.setflags(write=False)
    return lists


@dataclass(frozen=True)
class VerifyResult:
    """accepted [R] (0..num_draft), next_tokens [R]; complete [Mf] bool: False where top_count was too small for a row's
    filters (then nothing of its request holds: call again with more); log_probs [Ml]: of the raw logits at the slot's
    token, meaningful for slots 0 .. accepted."""

    accepted: ndarray
    next_tokens: ndarray
    complete: ndarray
    log_probs: ndarray


MASK_VALUES = {
    "float32": (np.float32(0), np.float32(-1e30)),
    "float16": (np.float16(0), np.float16(-3e4)),
    "bfloat16": (np.uint16(0), np.uint16(np.float32(-1e30).view(np.uint32) >> 16)),  # its bits: numpy has no bfloat16
}  # finite: a score plus the lowest float would overflow to -inf


@dataclass(frozen=True)
class PassLimits:
    """What engines of fixed sizes take at most. requests: rows of the caches; tokens: of prompts in a step, and of new
    context of one request in a backbone pass; context_rows: F of a backbone pass; kept_rows: feature rows that may wait
    for the draft, of all requests together, when a step begins."""

    requests: int
    tokens: int
    context_rows: int
    kept_rows: int


class Engines(Protocol):
    """A loaded bundle. Not thread safe: one thread drives it. `verify_rows`: wide rows that one verify call should have
    at most (what stays in this machine's caches), None = any number. `pass_limits`: None = passes of any size.
    `pass_worth`: empty slots x cache positions that take as long as one more pass (decoding/passes.py).
    Logits, features, hidden states and distributions need not be numpy's (engines/arrays.py says what they can do);
    ids, counts and statistics are, and may be waited for when they are first read.

    Cache row r of both caches belongs to active request r. `target_capacity` and `draft_capacity` are the C that the
    masks must have; they change only in `ensure_capacity`. write_index + Q <= C must hold in every call.
    `threads`, `provider`: what an SPS table must have been taken with. `cache_bytes`: memory of both caches now.
    """

    bundle: Bundle
    threads: int
    provider: str
    cache_bytes: int
    target_capacity: int
    draft_capacity: int
    verify_rows: int | None
    pass_limits: PassLimits | None
    pass_worth: int

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
