"""Rows of GPU memory that are taken and given back many times a round, without the driver: features that wait for the
draft.

Knows: one allocation and its free stretches. Refuses to know: requests, when a row is no longer needed (whoever drops
the last reference to an array gives its rows back).

A row may be taken again while work that reads it is still queued: all of it is on one stream, in order.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .array import DeviceArray
from .cuda import ALIGNMENT, Cuda, DeviceMemoryError


class Pool:
    """`rows` rows of `width` values of `dtype`."""

    def __init__(self, cuda: Cuda, what: str, rows: int, width: int, dtype: str = "float32"):
        self.cuda, self.what, self.dtype, self.rows = cuda, what, np.dtype(dtype), rows
        self.row_bytes = width * self.dtype.itemsize
        self.start = cuda.allocate(rows * self.row_bytes + ALIGNMENT, what)
        self.free: list[tuple[int, int]] = [(0, rows)]  # (first row, rows) in order, never neighbours

    @property
    def left(self) -> int:
        return sum(rows for _, rows in self.free)

    def copy(self, array: DeviceArray) -> DeviceArray:
        """The rows of an array in rows of the pool. Raises DeviceMemoryError where no stretch is long enough."""
        rows = len(array)
        owner = Stretch(self, self._take(rows), rows)
        address = self.start + owner.first * self.row_bytes
        if rows:
            self.cuda.copy(address, array.address, array.nbytes)
        return replace(array, address=address, end=address + array.nbytes, owner=owner)

    def _take(self, rows: int) -> int:
        for i, (first, there) in enumerate(self.free):
            if there >= rows:
                left = (first + rows, there - rows)
                self.free[i : i + 1] = [left] if left[1] else []
                return first
        if not rows:
            return 0
        raise DeviceMemoryError(
            f"{self.what}: no room for {rows} rows, {self.left} of {self.rows} are free; run fewer requests at once."
        )

    def give(self, first: int, rows: int) -> None:
        """Puts a stretch back and joins it with its neighbours."""
        stretches, joined = sorted([*self.free, (first, rows)]), []
        for at, count in stretches:
            if joined and joined[-1][0] + joined[-1][1] == at:
                joined[-1] = (joined[-1][0], joined[-1][1] + count)
            else:
                joined.append((at, count))
        self.free = joined


class Stretch:
    """Rows of a pool; they go back when the last array on them is gone."""

    def __init__(self, pool: Pool, first: int, rows: int):
        self.pool, self.first, self.rows = pool, first, rows

    def __del__(self) -> None:
        if self.rows:
            self.pool.give(self.first, self.rows)
