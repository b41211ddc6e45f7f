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

from .random import Noise, Uniforms
from .sampling import Edits

MAX_TEMPERATURE = 100.0
ACCEPT_RULES = ("rejection", "coupled")
MIN_TEMPERATURE = 1e-5  # below it logits / temperature has no float32 digits left; such a request is greedy


class RequestError(ValueError):
    """A request that is refused; the message is one sentence naming the field, its value and the allowed range."""


@dataclass(frozen=True)
class SamplingParams:
    """How to decode; what a field does and in which order they apply: decoding/sampling.py and docs/sampling.md.

    temperature 0 is greedy; threshold None leaves it to the scheduler; ignore_eos decodes on to max_tokens; speculative
    False decodes with the target alone; accept None leaves it to the loop. bad_words: token-id tuples; logit_bias:
    (token id, bias) pairs; both may be lists.
    """

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    speculative: bool = True
    threshold: float | None = None
    accept: str | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    return_log_probs: bool = False


@dataclass(frozen=True)
class Request:
    """One prompt (token ids) and how to continue it. `id` is the caller's, unique among the requests in flight."""

    id: Hashable
    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Limits:
    """What the engines can hold: `context` bounds prompt + max_tokens. min_tokens bans `eos_token_ids`."""

    context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, bundle: Bundle) -> Limits:
        """A block is never clipped near the end, so a request's last verify pass may reach G positions past its last
        token."""
        context = bundle.max_context - bundle.draft.block_size
        return cls(context, bundle.target.vocab_size, tuple(bundle.target.eos_token_ids))


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
    _validate_sampling(p, limits)


def _validate_sampling(p: SamplingParams, limits: Limits) -> None:
    """Accept rule, filters, penalties, bans and biases."""
    V = limits.vocab_size
    if p.accept is not None and p.accept not in ACCEPT_RULES:
        raise RequestError(f"accept is {p.accept!r}; it must be {' or '.join(ACCEPT_RULES)}.")
    for name, low, high in (("top_k", 0, V), ("min_tokens", 0, p.max_tokens)):
        value = getattr(p, name)
        if not _is_int(value) or not low <= value <= high:
            why = " (0 = off)" if name == "top_k" else " (max_tokens)"
            raise RequestError(f"{name} is {value}; it must lie in {low}..{high}{why}.")
    if not _in_range(p.top_p, 0.0, 1.0) or p.top_p == 0:
        raise RequestError(f"top_p is {p.top_p}; it must be over 0 and at most 1 (1 = off).")
    if not _in_range(p.min_p, 0.0, 1.0) or p.min_p == 1:
        raise RequestError(f"min_p is {p.min_p}; it must be at least 0 and under 1 (0 = off).")
    if not _in_range(p.repetition_penalty, 0.0, 10.0) or p.repetition_penalty == 0:
        raise RequestError(f"repetition_penalty is {p.repetition_penalty}; it must be over 0 and at most 10 (1 = off).")
    for name in ("presence_penalty", "frequency_penalty"):
        if not _in_range(getattr(p, name), -2.0, 2.0):
            raise RequestError(f"{name} is {getattr(p, name)}; it must lie in -2..2 (0 = off).")
    for name in ("ignore_eos", "speculative", "return_log_probs"):
        if not isinstance(getattr(p, name), (bool, np.bool_)):
            raise RequestError(f"{name} is {getattr(p, name)!r}; it must be true or false.")
    _validate_ids(p, limits)


def _validate_ids(p: SamplingParams, limits: Limits) -> None:
    V = limits.vocab_size
    if not isinstance(p.logit_bias, (tuple, list)):
        raise RequestError(f"logit_bias is {p.logit_bias!r}; it must be a list of (token id, bias) pairs.")
    biased: set[int] = set()
    for pair in p.logit_bias:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise RequestError(f"logit_bias holds {pair!r}; it must be a list of (token id, bias) pairs.")
        token, bias = pair
        if not _is_int(token) or not 0 <= token < V:
            raise RequestError(f"logit_bias holds the token id {token!r}; every id must lie in 0..{V - 1}.")
        if token in biased:
            raise RequestError(f"logit_bias holds the token id {token} twice; it must hold each id once.")
        if not _in_range(bias, -100.0, 100.0):
            raise RequestError(f"logit_bias gives the token id {token} the bias {bias}; it must lie in -100..100.")
        biased.add(int(token))
    if not isinstance(p.bad_words, (tuple, list)):
        raise RequestError(f"bad_words is {p.bad_words!r}; it must be a list of lists of token ids.")
    for word in p.bad_words:
        if not isinstance(word, (tuple, list)):
            raise RequestError(f"bad_words holds {word!r}; it must be a list of lists of token ids.")
        if not word:
            raise RequestError("bad_words holds an empty word; each must hold at least 1 token id.")
        for token in word:
            if not _is_int(token) or not 0 <= token < V:
                raise RequestError(f"bad_words holds the token id {token!r}; every id must lie in 0..{V - 1}.")
    ends = {int(word[-1]) for word in p.bad_words} | (set(limits.eos_token_ids) if p.min_tokens else set())
    if len(ends) >= V:
        raise RequestError(f"bad_words and min_tokens could ban all {V} tokens at once; they must leave at least 1.")


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
    accept: str = "rejection"  # the loop's rule, for a request that names none
    twin: int = 0  # tells requests in flight with equal seeds apart
    limits: Limits = Limits(0, 0)
    tokens: list[int] = field(default_factory=list)
    target_length: int = 0
    draft_length: int = 0
    pending: list[ndarray] = field(default_factory=list)
    pending_rows: int = 0
    emitted: int = 0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        p = self.request.params
        self.tokens = [int(t) for t in self.request.prompt_ids]
        self.prompt_length = len(self.tokens)
        self.temperature = float(p.temperature) if p.temperature >= MIN_TEMPERATURE else 0.0
        sampled = self.temperature > 0
        self.coupled = sampled and (p.accept or self.accept) == "coupled"
        self.drawn = sampled and not self.coupled  # judged by rejection sampling
        self.filtered = sampled and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        self.edits = Edits.of(p, self.prompt_length, self.limits.eos_token_ids)
        self.plain = not sampled and self.edits is None and not p.return_log_probs  # its argmax is all that is asked
        self.stream = Uniforms(int(p.seed), self.prompt_length, self.twin) if self.drawn else None
        self._noise = Noise(int(p.seed), self.limits.vocab_size) if self.coupled else None

    @property
    def decoding(self) -> bool:
        """The whole prompt has been fed: the next pass starts with the anchor."""
        return len(self.tokens) > self.prompt_length

    @property
    def anchor_position(self) -> int:
        """Position of the newest token."""
        return len(self.tokens) - 1

    def uniforms(self, purpose: int, count: int) -> ndarray:
        """[count] ACCEPT or NEXT uniforms for the tokens after the newest one, of a request with `drawn`."""
        return self.stream.judge(purpose, len(self.tokens), count)

    def draft_uniforms(self, slots: int) -> ndarray:
        """[slots] for the next draft of a request with `drawn`; to be called once a draft."""
        return self.stream.draft(slots)

    def noise(self, count: int) -> ndarray:
        """[count, V] Gumbel noise for the tokens after the newest one, of a request with `coupled`."""
        return self._noise.rows(len(self.tokens), count)

    def keep(self, features: ndarray, own: bool = False) -> None:
        """Feature rows [n, L*d] of the newest committed context, until the draft's next pass. own: nobody will write them
        again; else they are copied."""
        self.pending.append(features if own else features.copy())
        self.pending_rows += len(features)

    def waiting(self, rows: int) -> list[ndarray]:
        """The first `rows` feature rows that wait for the draft, in pieces."""
        pieces = []
        for piece in self.pending:
            if rows <= 0:
                break
            pieces.append(piece if len(piece) <= rows else piece[:rows])
            rows -= len(piece)
        return pieces

    def following(self, rows: int) -> list[int]:
        """The tokens behind the positions of the first `rows` feature rows that wait."""
        return self.tokens[self.draft_length + 1 : self.draft_length + 1 + rows]

    def injected(self, rows: int) -> None:
        """The draft's cache now holds the first `rows` of what waited."""
        self.draft_length += rows
        self.pending_rows -= rows
        while rows > 0 and len(self.pending[0]) <= rows:
            rows -= len(self.pending.pop(0))
        if rows > 0:
            self.pending[0] = self.pending[0][rows:]
