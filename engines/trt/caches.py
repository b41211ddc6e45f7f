"""Key-value caches of one engine in GPU memory: rows of a fixed length, one a request.

Knows: memory and its layout. Refuses to know: what the positions mean, who writes them.
"""

from __future__ import annotations

import numpy as np

from .cuda import Cuda


class DeviceCaches:
    """`names` caches [rows, heads, length, head_dim] of `dtype` (numpy's name of as many bytes). Zeros at first: a
    masked position that holds NaN would poison the softmax's product."""

    def __init__(self, cuda: Cuda, names: list[str], rows: int, heads: int, length: int, head_dim: int, dtype: str):
        self.cuda, self.rows, self.heads = cuda, rows, heads
        self.position_bytes = head_dim * np.dtype(dtype).itemsize
        self.head_bytes = length * self.position_bytes
        self.row_bytes = heads * self.head_bytes
        self._starts = {}
        for name in names:
            self._starts[name] = cuda.allocate(rows * self.row_bytes, f"the cache {name}")
            cuda.zero(self._starts[name], rows * self.row_bytes)

    @property
    def nbytes(self) -> int:
        return len(self._starts) * self.rows * self.row_bytes

    def address(self, name: str, first_row: int) -> int:
        return self._starts[name] + first_row * self.row_bytes

    def move_row(self, source: int, destination: int, length: int) -> None:
        """Queues the copy of the first `length` positions of row `source` over row `destination`."""
        if source == destination or length == 0:
            return
        for name in self._starts:
            places = self.address(name, destination), self.address(name, source)
            self.cuda.copy_rows(*places, length * self.position_bytes, self.head_bytes, self.heads)
