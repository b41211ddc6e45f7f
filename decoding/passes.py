"""Which rows share a target pass.

Knows: how many tokens each cache row feeds, what an empty slot costs. Refuses to know: requests, drafts, engines.

A pass works on [rows, Q] slots: a row beside a longer one attends from empty slots too. A pass of its own for the longer
one reads the weights once more instead.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """Rows first_row .. first_row + len(counts) - 1 of one target pass; counts: tokens fed, 0 = only in the way."""

    first_row: int
    counts: list[int]

    @property
    def slots(self) -> int:
        return len(self.counts) * max(self.counts)


def plan(counts: list[int], decode: list[bool], capacity: int, worth: int) -> list[Pass]:
    """The cheapest passes that feed counts [R] tokens (one of them at least 1): decode rows and prompt chunks in the
    order of their rows, or decode rows in one pass and the chunks in others.

    A pass costs `worth` and its slots times `capacity`, the cache positions that a slot attends (Engines.pass_worth).
    """
    chunks = [0 if d else n for n, d in zip(counts, decode)]
    own = [n if d else 0 for n, d in zip(counts, decode)]
    if not any(chunks):
        return [_span(counts, 0, len(counts) - 1)]
    if not any(own):
        return _cheapest(chunks, capacity, worth)[1]
    alone = _span(own, 0, len(own) - 1)
    together, apart = _cheapest(counts, capacity, worth), _cheapest(chunks, capacity, worth)
    if together[0] <= apart[0] + worth + alone.slots * capacity:
        return together[1]
    return [alone, *apart[1]]


def _cheapest(counts: list[int], capacity: int, worth: int) -> tuple[int, list[Pass]]:
    """(cost, passes) of the rows with counts over 0, neighbours together: the best cut before each row, from the first
    on."""
    used = [row for row, n in enumerate(counts) if n]
    best = [(0, 0)]  # for the first k of `used`: cost, and how many of them lie before the last pass
    for k, last in enumerate(used):
        longest, found = 0, None
        for j in range(k, -1, -1):
            longest = max(longest, counts[used[j]])
            own = worth + (last - used[j] + 1) * longest * capacity
            if found is None or best[j][0] + own < found[0]:
                found = best[j][0] + own, j
            elif own > found[0]:
                break  # a longer pass only costs more
        best.append(found)
    passes, k = [], len(used)
    while k:
        j = best[k][1]
        passes.append(_span(counts, used[j], used[k - 1]))
        k = j
    return best[-1][0], passes[::-1]


def _span(counts: list[int], first: int, last: int) -> Pass:
    """The rows first .. last, less those at the ends that feed nothing."""
    used = [row for row in range(first, last + 1) if counts[row]]
    return Pass(used[0], counts[used[0] : used[-1] + 1])
