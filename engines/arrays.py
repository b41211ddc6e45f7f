"""Arrays that engines exchange, wherever they lie: numpy's in host memory, a device's behind the same few words.

Knows: which words callers may use of an array that need not be numpy's (shape, dtype, len, slices and rows of the first
axis, copy). Refuses to know: devices, runtimes.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray


class Rows:
    """Pieces [n_i, ...] that count as one array of their rows, not yet next to each other: whoever takes them puts them
    there. `pieces`: arrays of equal dtype and row shape. `rows`: more than theirs, the others may hold anything."""

    def __init__(self, pieces: list, rows: int | None = None):
        self.pieces = pieces
        count = sum(len(piece) for piece in pieces) if rows is None else rows
        self.shape = (count, *pieces[0].shape[1:])
        self.dtype, self.ndim = pieces[0].dtype, len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]


def concatenate(pieces: list) -> ndarray | Rows:
    """The rows of all pieces as one array; Rows where one of them is not numpy's."""
    if all(isinstance(piece, ndarray) for piece in pieces):
        return np.concatenate(pieces)
    return Rows(pieces)


def to_host(array) -> ndarray:
    """A numpy array of an engine's result; what lies on a device is copied and waited for. Not for a decode round."""
    return array if isinstance(array, ndarray) else array.numpy()
