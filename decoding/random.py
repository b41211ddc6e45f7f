"""Randomness as a function of a request's seed, whatever the request is batched with.

Knows: Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the 4x32 form for single uniforms,
numpy's 4x64 bit generator for rows of Gumbel noise. Refuses to know: who draws, and what from.

ACCEPT and NEXT uniforms are keyed by position: one that is used is never looked at again unless its position is
committed. DRAFT uniforms are keyed by the number of the request's draft and the slot: what a discarded draft looked like
steers the budgets of later rounds, so the next draft of the same position must not be made of the same numbers.
Gumbel noise is keyed by position: under the coupled rule the text depends on nothing else, so nothing can leak.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

DRAFT, ACCEPT, NEXT = 0, 1, 2  # purposes: draw of a draft token, its judgement, the token after the last accepted one
PURPOSES = 3

_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: ndarray, key: tuple[int, int]) -> ndarray:
    """Ten rounds of Philox-4x32. counter [4, ...] of 32-bit words in uint64; key two 32-bit words. Returns [4, ...]."""
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2, words 1 and 3
    column = (2,) + (1,) * (counter.ndim - 1)
    multipliers = _MULTIPLIERS.reshape(column)
    for i in range(10):
        keys = np.array([(k + i * w) & 0xFFFFFFFF for k, w in zip(key, _WEYL)], np.uint64).reshape(column)
        product = (even * multipliers)[::-1]
        even, odd = (product >> _SHIFT) ^ odd ^ keys, product & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(
    seed: int, position: ndarray | int, purpose: ndarray | int, slot: ndarray | int = 0, twin: int = 0
) -> ndarray:
    """float32 uniforms of the arguments' broadcast shape: k * 2^-23, so 0 <= u <= 1 - 2^-23.

    seed: 0 .. 2^64-1 (the key). position: absolute position of the token that is judged or follows, or the number of the
    draft, 0 .. 2^64-1. slot: of a draft token in its block. twin: 0 .. 2^30-1, tells requests with equal seeds apart.
    The counter is (position low, position high, purpose + 4 * twin, slot); the first output word's upper 23 bits are used.
    u <= 1 - 2^-23 makes u * total < total in float32: an inverse CDF never runs past its end.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must lie in 0..2^64-1.")
    position, purpose, slot = (np.asarray(x, np.uint64) for x in (position, purpose, slot))
    counter = np.zeros((4, *np.broadcast_shapes(position.shape, purpose.shape, slot.shape)), np.uint64)
    counter[0], counter[1], counter[2], counter[3] = position & _LOW, position >> _SHIFT, purpose, slot
    counter[2] += np.uint64(4 * twin)
    word = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[0]
    return (word >> np.uint64(9)).astype(np.float32) * np.float32(2.0**-23)


def gumbel(seed: int, position: int, out: ndarray) -> ndarray:
    """Fills out [V] float32 with standard Gumbel noise -log(E), one number a token, and returns it.

    E = -log(1 - v) is exponential, v = (w + 1/2) / 2^32 of a 32-bit word w, in float32 and at most 1 - 2^-24. Philox-4x64
    with the key (seed, position) and numpy's stream from counter 0 on; a 64-bit output gives two words, the low half
    first. A small v keeps all its digits: it makes the large noise that lifts rare tokens.
    """
    size = len(out)
    raw = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw((size + 1) // 2)
    out[:] = raw.astype("<u8", copy=False).view("<u4")[:size]
    out *= np.float32(-(2.0**-32) * (1 - 2.0**-24))
    out -= np.float32(2.0**-33)
    np.log1p(out, out=out)
    np.negative(out, out=out)
    np.log(out, out=out)
    return np.negative(out, out=out)


class Uniforms:
    """One request's uniforms, made some positions ahead."""

    AHEAD = 128

    def __init__(self, seed: int, first: int, twin: int = 0):
        """`first`: the first position that will be asked for."""
        self.seed, self.twin, self.first, self.drafts = seed, twin, first, 0
        self._judge = np.zeros((2, 0), np.float32)  # ACCEPT and NEXT of positions first ..
        self._draft = np.zeros((0, 0), np.float32)  # of drafts _draft_first .., [drafts, G]
        self._draft_first = 0

    def judge(self, purpose: int, position: int, count: int) -> ndarray:
        """[count] ACCEPT or NEXT uniforms of positions position .. position + count - 1."""
        start, have = position - self.first, self._judge.shape[1]
        if start + count > have:
            more = self.first + np.arange(have, start + count + self.AHEAD)
            fresh = uniforms(self.seed, more[None], np.array([[ACCEPT], [NEXT]]), twin=self.twin)
            self._judge = np.concatenate([self._judge, fresh], axis=1)
        return self._judge[purpose - ACCEPT, start : start + count]

    def draft(self, slots: int) -> ndarray:
        """[slots] for the request's next draft: no two calls give the same numbers."""
        row = self.drafts - self._draft_first
        if row >= len(self._draft):
            numbers = self.drafts + np.arange(max(self.AHEAD // slots, 1))
            self._draft = uniforms(self.seed, numbers[:, None], DRAFT, np.arange(slots)[None], self.twin)
            self._draft_first, row = self.drafts, 0
        self.drafts += 1
        return self._draft[row]


class Noise:
    """One request's Gumbel noise: rows are kept while their position may be asked for again."""

    def __init__(self, seed: int, vocab_size: int):
        self.seed = seed
        self._rows = np.empty((0, vocab_size), np.float32)
        self._first, self._count = 0, 0

    def rows(self, position: int, count: int) -> ndarray:
        """[count, V] of positions position .. position + count - 1; a view until the next call. Positions never go back."""
        passed = position - self._first
        kept = max(self._count - passed, 0)
        if passed and kept:
            self._rows[:kept] = self._rows[passed : passed + kept].copy()
        self._first, self._count = position, kept
        if count > len(self._rows):
            rows = np.empty((count, self._rows.shape[1]), np.float32)
            rows[:kept] = self._rows[:kept]
            self._rows = rows
        for k in range(kept, count):
            gumbel(self.seed, position + k, self._rows[k])
        self._count = max(kept, count)
        return self._rows[:count]
