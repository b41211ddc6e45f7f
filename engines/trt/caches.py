"""Key-value caches of one engine in GPU memory: rows of a fixed length, one a request.

Knows: memory and its layout. Refuses to know: what the positions mean, who writes them.
"""

from __future__ import annotations

import numpy as np

from .cuda import Cuda


class DeviceCaches:
    """Caches [rows, heads, length, head_dim] of `dtype` (numpy's name of as many bytes); shapes: {name: (heads,
    head_dim)}. Zeros at first: a masked position that holds NaN would poison the softmax's product."""

    def __init__(self, cuda: Cuda, shapes: dict[str, tuple[int, int]], rows: int, length: int, dtype: str):
        self.cuda, self.rows, size = cuda, rows, np.dtype(dtype).itemsize
        self._sizes = {name: (heads, D * size, length * D * size) for name, (heads, D) in shapes.items()}
        self._starts = {}
        for name in shapes:
            self._starts[name] = cuda.allocate(rows * self._row_bytes(name), f"the cache {name}")
            cuda.zero(self._starts[name], rows * self._row_bytes(name))

    def _row_bytes(self, name: str) -> int:
        heads, _, head_bytes = self._sizes[name]
        return heads * head_bytes

    @property
    def nbytes(self) -> int:
        return sum(self.rows * self._row_bytes(name) for name in self._starts)

    def address(self, name: str, first_row: int) -> int:
        return self._starts[name] + first_row * self._row_bytes(name)

    def move_row(self, source: int, destination: int, length: int) -> None:
        """Queues the copy of the first `length` positions of row `source` over row `destination`."""
        if source == destination or length == 0:
            return
        for name, (heads, position_bytes, head_bytes) in self._sizes.items():
            places = self.address(name, destination), self.address(name, source)
            self.cuda.copy_rows(*places, length * position_bytes, head_bytes, heads)
