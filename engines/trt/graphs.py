"""Recorded launches (CUDA graphs) of one engine, the least recently used dropped first.

Knows: which launches were seen before. Refuses to know: how one is recorded, what it computes.

A graph holds the addresses and shapes of its recording, and its execution context must never be changed again: each
graph has a context of its own, which is dropped with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from .cuda import Cuda

REMEMBERED = 8  # times as many launches are remembered as recorded


class Graphs:
    """At most `most` graphs; 0 = nothing is ever recorded."""

    def __init__(self, cuda: Cuda, most: int):
        self.cuda, self.most = cuda, most
        self._kept: OrderedDict[Hashable, tuple] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable):
        """The graph of a launch, or None."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def again(self, key: Hashable) -> bool:
        """Whether a launch was seen before and should now be recorded; remembers it."""
        if not self.most:
            return False
        seen = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > REMEMBERED * self.most:
            self._seen.popitem(last=False)
        return seen

    def keep(self, key: Hashable, graph, context) -> None:
        """`context`: the execution context that the graph was recorded on."""
        if len(self._kept) >= self.most:
            self.cuda.synchronize()  # it may still be running
            self.cuda.drop(self._kept.popitem(last=False)[1][0])
        self._kept[key] = graph, context

    def clear(self) -> None:
        """The stream must have no work left. Never raises."""
        for graph, _ in self._kept.values():
            self.cuda.drop(graph)
        self._kept.clear()
        self._seen.clear()
