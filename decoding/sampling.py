"""Edits: what a request's penalties, biases and bans do to the logits of a verify block.

Knows: the order below and how the text so far sets it. Refuses to know: engines, probabilities, batches.

From a row of raw logits to the distribution that a token is drawn from, in this order (docs/sampling.md):
1. repetition penalty r, for every token of prompt and output: l / r if l > 0, else l * r;
2. presence and frequency penalty, for tokens of the output with count c > 0: l - presence - frequency * c;
3. logit_bias: l + bias;
4. bans: bad_words (the last token of a word whose earlier tokens end the text so far, prompt included) and, before
   min_tokens, the end-of-sequence tokens;
5. temperature; 6. top_k; 7. top_p (of what top_k left, renormalised); 8. min_p. The filters keep by value: ties stay
together. 1 to 4 are made here, as l -> (l / s if l > 0 else l * s) + a for the few tokens that they touch; the verify
engine does that and the rest. Row j of a block sees the text up to draft token x_j: the prefix it is conditioned on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Sequence

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    from .request import SamplingParams

BAN = np.float32(-np.inf)  # the graph clips it to a large finite number


class Block(NamedTuple):
    """Edits of one request's rows: tokens [U] (each once), scale [rows, U], add [rows, U] float32."""

    tokens: ndarray
    scale: ndarray
    add: ndarray


class Edits:
    """One request's edits; follows the growing text by itself."""

    def __init__(self, params: SamplingParams, prompt_length: int, eos: Sequence[int] = ()):
        self.repetition = float(params.repetition_penalty)
        self.presence, self.frequency = float(params.presence_penalty), float(params.frequency_penalty)
        self.counts_prompt = self.repetition != 1
        self.counts_output = self.counts_prompt or self.presence != 0 or self.frequency != 0
        self.prompt_length, self.min_tokens, self.eos = prompt_length, params.min_tokens, tuple(eos)
        self.banned = tuple({int(w[0]) for w in params.bad_words if len(w) == 1})
        self.words: dict[int, list[tuple[int, ...]]] = {}  # longer bad words by the token before their last
        for word in {tuple(map(int, w)) for w in params.bad_words if len(w) > 1}:
            self.words.setdefault(word[-2], []).append(word)
        self._column: dict[int, int] = {}  # token -> column of the arrays below
        self._tokens, self._bias = np.zeros(16, np.int64), np.zeros(16)
        self._seen, self._count = np.zeros(16, bool), np.zeros(16)
        for token, bias in params.logit_bias:
            self._bias[self._add(int(token))] = bias
        for token in self.banned:
            self._add(token)
        self._followed = 0

    @classmethod
    def of(cls, params: SamplingParams, prompt_length: int, eos: Sequence[int] = ()) -> Edits | None:
        """None for a request that edits nothing."""
        bans = params.bad_words or (params.min_tokens and eos)
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        return cls(params, prompt_length, eos) if bans or penalties or params.logit_bias else None

    def block(self, text: list[int], draft: list[int]) -> Block:
        """For rows 0 .. len(draft): row j gives the token after `text` (prompt and output) and the first j of
        `draft`."""
        self._follow(text)
        n, base = len(draft), len(self._column)
        bans = [self._bans(text, draft[:j]) for j in range(n + 1)]
        new: dict[int, int] = {}  # columns for this block only
        for token in [*(draft if self.counts_output else ()), *(t for row in bans for t in row)]:
            if token not in self._column:
                new.setdefault(token, base + len(new))
        column = lambda token: new[token] if token in new else self._column[token]
        U = base + len(new)
        tokens = np.concatenate([self._tokens[:base], np.fromiter(new, np.int64, len(new))])
        seen, count, bias = np.zeros((n + 1, U), bool), np.zeros((n + 1, U)), np.zeros(U)
        seen[:, :base], count[:, :base], bias[:base] = self._seen[:base], self._count[:base], self._bias[:base]
        if self.counts_output:
            for j, token in enumerate(draft, start=1):
                seen[j:, column(token)] = True
                count[j:, column(token)] += 1
        scale = np.where(seen, self.repetition, 1.0).astype(np.float32)
        add = (bias - self.presence * (count > 0) - self.frequency * count).astype(np.float32)
        for j, row in enumerate(bans):
            add[j, [column(token) for token in row]] = BAN
        return Block(tokens, scale, add)

    def _bans(self, text: list[int], draft: list[int]) -> list[int]:
        banned = list(self.banned)
        if len(text) + len(draft) - self.prompt_length < self.min_tokens:
            banned += self.eos
        if not self.words:
            return banned
        last = draft[-1] if draft else text[-1]
        for word in self.words.get(last, ()):
            before = len(word) - 1
            tail = [*text[-before:], *draft][-before:]
            if tail == list(word[:-1]):
                banned.append(word[-1])
        return banned

    def _follow(self, text: list[int]) -> None:
        """Counts the tokens that came since the last call."""
        if self.counts_output:
            for position in range(
                self._followed if self.counts_prompt else max(self._followed, self.prompt_length), len(text)
            ):
                column = self._add(text[position])
                self._seen[column] = True
                self._count[column] += position >= self.prompt_length
        self._followed = len(text)

    def _add(self, token: int) -> int:
        """The token's column, made if need be."""
        column = self._column.setdefault(token, len(self._column))
        if column == len(self._tokens):
            for name in ("_tokens", "_bias", "_seen", "_count"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self._tokens[column] = token
        return column
