"""Randomness as a function of a request's seed, whatever the request is batched with.

Knows: Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the 4x32 form for single
uniforms, numpy's 4x64 bit generator for rows of Gumbel noise. Refuses to know: who draws, and what from.

ACCEPT and NEXT uniforms are keyed by position: one that is used is never looked at again unless its position is
committed. DRAFT uniforms are keyed by the number of the request's draft and the slot: what a discarded draft looked
like steers the budgets of later rounds, so the next draft of the same position must not be made of the same numbers.
Gumbel noise is keyed by position: under the coupled rule the text depends on nothing else, so nothing can leak.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

DRAFT, ACCEPT, NEXT = 0, 1, 2  # purposes: draw of a draft token, its judgement, the token after the last accepted one
AHEAD = 64  # numbers made at once for a request

_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)


def philox4x32(counter: ndarray, key: ndarray) -> ndarray:
    """Ten rounds of Philox-4x32. counter [4, ...] and key [2, ...] (it broadcasts) of 32-bit words in uint64. Returns
    [4, ...]."""
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2, words 1 and 3
    multipliers = _MULTIPLIERS.reshape(2, *(1,) * (counter.ndim - 1))
    weyl = _WEYL.reshape(2, *(1,) * (key.ndim - 1))
    for i in range(10):
        product = (even * multipliers)[::-1]
        even, odd = (product >> _SHIFT) ^ odd ^ ((key + np.uint64(i) * weyl) & _LOW), product & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(
    seed: ndarray | int,
    position: ndarray | int,
    purpose: ndarray | int,
    slot: ndarray | int = 0,
    twin: ndarray | int = 0,
) -> ndarray:
    """float32 uniforms of the arguments' broadcast shape: k * 2^-23, so 0 <= u <= 1 - 2^-23.

    seed: 0 .. 2^64-1 (the key). position: absolute position of the token that is judged or follows, or the number of
    the draft, 0 .. 2^64-1. slot: of a draft token in its block. twin: 0 .. 2^30-1, tells requests with equal seeds
    apart. The counter is (position low, position high, purpose + 4 * twin, slot); the first output word's upper 23 bits
    are used. u <= 1 - 2^-23 makes u * total < total in float32: an inverse CDF never runs past its end.
    """
    if isinstance(seed, int) and not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must lie in 0..2^64-1.")
    seed, position, purpose, slot, twin = (np.asarray(x, np.uint64) for x in (seed, position, purpose, slot, twin))
    shape = np.broadcast_shapes(seed.shape, position.shape, purpose.shape, slot.shape, twin.shape)
    counter = np.empty((4, *shape), np.uint64)
    counter[0], counter[1] = position & _LOW, position >> _SHIFT
    counter[2], counter[3] = purpose + np.uint64(4) * twin, slot
    key = np.stack([seed & _LOW, seed >> _SHIFT])
    word = philox4x32(counter, key.reshape(2, *(1,) * (len(shape) - seed.ndim), *seed.shape))[0]
    return (word >> np.uint64(9)).astype(np.float32) * np.float32(2.0**-23)


def gumbel(seed: int, position: int, out: ndarray) -> ndarray:
    """Fills out [V] float32 with standard Gumbel noise -log(E), one number a token, and returns it.

    E = -log(1 - v) is exponential, v = (w + 1/2) / 2^32 of a 32-bit word w, in float32 and at most 1 - 2^-24.
    Philox-4x64 with the key (seed, position) and numpy's stream from counter 0 on; a 64-bit output gives two words, the
    low half first. A small v keeps all its digits: it makes the large noise that lifts rare tokens.
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
    """One request's uniforms, made ahead; `prepare_judge` and `prepare_draft` make them for many requests at once."""

    def __init__(self, seed: int, first: int, twin: int = 0):
        """`first`: the first position that will be asked for."""
        self.seed, self.twin, self.first, self.drafts = seed, twin, first, 0
        self.judges = np.zeros((2, 0), np.float32)  # ACCEPT and NEXT of positions first ..
        self.blocks, self.first_block = np.zeros((0, 0), np.float32), 0  # [drafts, G] of drafts first_block ..

    def judge(self, purpose: int, position: int, count: int) -> ndarray:
        """[count] ACCEPT or NEXT uniforms of positions position .. position + count - 1."""
        prepare_judge([self], [position], count)
        start = position - self.first
        return self.judges[purpose - ACCEPT, start : start + count]

    def draft(self, slots: int) -> ndarray:
        """[slots] for the request's next draft: no two calls give the same numbers."""
        prepare_draft([self], slots)
        self.drafts += 1
        return self.blocks[self.drafts - 1 - self.first_block]


def prepare_judge(streams: list[Uniforms], positions: list[int], count: int) -> None:
    """Makes what `judge` will be asked for: `count` positions from each of `positions` on."""
    short = [u for u, p in zip(streams, positions) if p - u.first + count > u.judges.shape[1]]
    if not short:
        return
    starts = np.array([u.first + u.judges.shape[1] for u in short], np.int64)
    needed = max(p + count for p in positions) - int(starts.min())
    place = starts[:, None] + np.arange(max(needed, AHEAD))
    seeds, twins = _keys(short)
    fresh = uniforms(seeds[:, None, None], place[:, None], np.array([[ACCEPT], [NEXT]]), twin=twins[:, None, None])
    for u, rows in zip(short, fresh):
        u.judges = np.concatenate([u.judges, rows], axis=1)


def prepare_draft(streams: list[Uniforms], slots: int) -> None:
    """Makes what the next `draft` will be asked for."""
    short = [u for u in streams if u.drafts - u.first_block >= len(u.blocks)]
    if not short:
        return
    numbers = np.array([u.drafts for u in short], np.int64)[:, None] + np.arange(max(AHEAD // slots, 1))
    seeds, twins = _keys(short)
    fresh = uniforms(seeds[:, None, None], numbers[..., None], DRAFT, np.arange(slots), twins[:, None, None])
    for u, blocks in zip(short, fresh):
        u.blocks, u.first_block = blocks, u.drafts


def _keys(streams: list[Uniforms]) -> tuple[ndarray, ndarray]:
    return np.array([u.seed for u in streams], np.uint64), np.array([u.twin for u in streams], np.uint64)


class Noise:
    """One request's Gumbel noise: rows are kept while their position may be asked for again."""

    def __init__(self, seed: int, vocab_size: int):
        self.seed = seed
        self._rows = np.empty((0, vocab_size), np.float32)
        self._first, self._count = 0, 0

    def rows(self, position: int, count: int) -> ndarray:
        """[count, V] of positions position .. position + count - 1; a view until the next call. Positions never go
        back."""
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
