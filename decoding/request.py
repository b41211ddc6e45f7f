"""Requests: what a caller asks for, what is refused, and a request's state while it is being decoded.

Knows: the ranges of every field, what a request has in the caches. Refuses to know: batches, engines, text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Hashable

import numpy as np
from numpy import ndarray

from engines.bundle import Bundle

from .random import PURPOSES, uniforms

MAX_TEMPERATURE = 100.0
MIN_TEMPERATURE = 1e-5  # below it logits / temperature has no float32 digits left; such a request is greedy


class RequestError(ValueError):
    """A request that is refused; the message is one sentence naming the field, its value and the allowed range."""


@dataclass(frozen=True)
class SamplingParams:
    """How to decode. temperature 0 is greedy; threshold None leaves it to the scheduler; ignore_eos decodes on to
    max_tokens; speculative False decodes with the target alone."""

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    speculative: bool = True
    threshold: float | None = None


@dataclass(frozen=True)
class Request:
    """One prompt (token ids) and how to continue it. `id` is the caller's, unique among the requests in flight."""

    id: Hashable
    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Limits:
    """What the engines can hold: `context` bounds prompt + max_tokens."""

    context: int
    vocab_size: int

    @classmethod
    def of(cls, bundle: Bundle) -> Limits:
        """A block is never clipped near the end, so a request's last verify pass may reach G positions past its last token."""
        return cls(context=bundle.max_context - bundle.draft.block_size, vocab_size=bundle.target.vocab_size)


def validate(request: Request, limits: Limits) -> None:
    """Raises RequestError for the first thing that does not fit."""
    ids, p = request.prompt_ids, request.params
    if len(ids) == 0:
        raise RequestError("prompt is empty; it must hold at least 1 token.")
    if len(ids) >= limits.context:
        raise RequestError(
            f"prompt is {len(ids)} tokens long; it must be at most {limits.context - 1} tokens "
            f"(context {limits.context})."
        )
    array = np.asarray(ids)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise RequestError("input_ids must be a list of integers.")
    if array.min() < 0 or array.max() >= limits.vocab_size:
        bad = int(array[(array < 0) | (array >= limits.vocab_size)][0])
        raise RequestError(f"input_ids holds {bad}; every id must lie in 0..{limits.vocab_size - 1}.")
    most = limits.context - len(ids)
    if not _is_int(p.max_tokens) or not 1 <= p.max_tokens <= most:
        raise RequestError(
            f"max_tokens is {p.max_tokens}; it must lie in 1..{most} "
            f"(context {limits.context} less the prompt's {len(ids)})."
        )
    if not _in_range(p.temperature, 0.0, MAX_TEMPERATURE):
        raise RequestError(f"temperature is {p.temperature}; it must lie in 0..{MAX_TEMPERATURE:g} (0 = greedy).")
    if not _is_int(p.seed) or not 0 <= p.seed < 1 << 64:
        raise RequestError(f"seed is {p.seed}; it must lie in 0..2^64-1.")
    if p.threshold is not None and not _in_range(p.threshold, 0.0, 1.0):
        raise RequestError(f"threshold is {p.threshold}; it must lie in 0..1.")


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _in_range(value: object, low: float, high: float) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


@dataclass
class Sequence:
    """A request being decoded, in one cache row.

    tokens: prompt and generated ids. target_length: tokens the target's cache holds; while decoding that is all but
    the newest token (the anchor, at position target_length). draft_length: context positions in the draft's cache;
    `pending` [.., L*d] are the features of positions draft_length .. target_length - 1, not yet handed to the draft.
    """

    request: Request
    speculative: bool
    slack: int  # positions past the last token that a verify block may touch
    tokens: list[int] = field(default_factory=list)
    target_length: int = 0
    draft_length: int = 0
    pending: list[ndarray] = field(default_factory=list)
    pending_rows: int = 0
    emitted: int = 0
    temperature: float = 0.0
    _table: ndarray | None = None  # [PURPOSES, positions] uniforms from the prompt's end on

    def __post_init__(self) -> None:
        p = self.request.params
        self.tokens = [int(t) for t in self.request.prompt_ids]
        self.prompt_length = len(self.tokens)
        self.temperature = float(p.temperature) if p.temperature >= MIN_TEMPERATURE else 0.0
        if self.temperature > 0:
            positions = self.prompt_length + np.arange(p.max_tokens + self.slack + 1)
            self._table = uniforms(int(p.seed), positions[None, :], np.arange(PURPOSES)[:, None])

    @property
    def decoding(self) -> bool:
        """The whole prompt has been fed: the next pass starts with the anchor."""
        return len(self.tokens) > self.prompt_length

    @property
    def anchor_position(self) -> int:
        """Position of the newest token."""
        return len(self.tokens) - 1

    def uniforms(self, purpose: int, count: int) -> ndarray:
        """[count] for the tokens after the newest one; zeros for a greedy request."""
        if self._table is None:
            return np.zeros(count, np.float32)
        start = len(self.tokens) - self.prompt_length
        return self._table[purpose, start : start + count]

    def keep(self, features: ndarray) -> None:
        """Copies feature rows [n, L*d] of the newest committed context until the draft's next pass."""
        self.pending.append(features.copy())
        self.pending_rows += len(features)

    def injected(self) -> None:
        """The draft's cache now holds everything up to target_length."""
        self.draft_length += self.pending_rows
        self.pending, self.pending_rows = [], 0
