"""Linear key-value caches of one engine: buffers [rows, H_kv, capacity, D], each of its own H_kv and D, that grow and
shrink in steps.

Knows: memory and its layout. Refuses to know: what the positions mean, who writes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

STEP, ROOM = 64, 256
PATIENCE = 64  # consecutive calls that a smaller capacity would have served before the caches shrink to it


def bucket(length: int, least: int = STEP) -> int:
    """The smallest capacity that holds `length` positions: multiples of `least` or of an eighth of the length's power of two,
    whichever is more. Attention may read all C positions of every row in every pass; a growth moves them once."""
    step = max(least, 1 << max((length - 1).bit_length() - 3, 0))
    return max(step, -(-length // step) * step)


class Caches:
    """`tensors[i]`: cache i, [rows, *shapes[i] with capacity between], shapes[i] = (heads, head_dim); rows a power of
    two. Neighbouring rows are contiguous
    memory, so the active rows are bound to an engine by their address alone. `generation` changes whenever addresses
    do.

    Memory is taken for the next multiple of ROOM positions, so that most steps only move rows apart within it: fresh
    memory would cost more than the move."""

    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: str = "float32", step: int = STEP):
        """step: positions by which they grow."""
        self.shapes, self.dtype, self.step = tuple(shapes), np.dtype(dtype), step
        self.rows, self.capacity, self.generation = 1, step, 0
        self._idle, self._wanted = 0, 0
        self.tensors = [self._empty(shape, 1, step) for shape in self.shapes]

    def _empty(self, shape: tuple[int, int], rows: int, capacity: int) -> ndarray:
        # Zeros, never uninitialised memory: a masked position holding NaN would still poison the softmax's product.
        heads, head_dim = shape
        room = np.zeros(rows * heads * self._room(capacity) * head_dim, self.dtype)
        return self._shaped(room, shape, rows, capacity)

    def _shaped(self, room: ndarray, shape: tuple[int, int], rows: int, capacity: int) -> ndarray:
        """The tensor at the start of the flat `room`."""
        heads, head_dim = shape
        full = (rows, heads, capacity, head_dim)
        return room[: np.prod(full)].reshape(full)

    @staticmethod
    def _room(capacity: int) -> int:
        return -(-capacity // ROOM) * ROOM

    def _move_apart(self, tensor: ndarray, capacity: int, keep: int) -> ndarray:
        """`tensor` with another capacity in its own memory: what was beyond the old capacity is old, finite data."""
        heads, head_dim = tensor.shape[1], tensor.shape[3]
        room, new = tensor.base, self._shaped(tensor.base, (heads, head_dim), len(tensor), capacity)
        size, step = min(self.capacity, capacity) * head_dim, (self.capacity * head_dim, capacity * head_dim)
        order = range(keep * heads)
        for block in reversed(order) if capacity > self.capacity else order:  # never over a block that has yet to move
            source, destination = block * step[0], block * step[1]
            room[destination : destination + size] = room[source : source + size]
        return new

    def ensure(self, rows: int, length: int) -> None:
        """Holds `rows` rows of `length` positions, keeping the first positions of every row that stays.

        Grows at once; shrinks when a smaller capacity would have done for PATIENCE calls on end.
        Raises MemoryError, and is then empty, when there is no room.
        """
        capacity = bucket(length, self.step)
        if capacity < self.capacity:
            self._idle += 1
            self._wanted = max(self._wanted, capacity)
            capacity = self._wanted if self._idle >= PATIENCE and self._wanted < self.capacity else self.capacity
        else:
            self._idle, self._wanted = 0, 0
        wanted = self.rows if rows <= self.rows else 1 << (rows - 1).bit_length()
        if capacity == self.capacity and wanted == self.rows:
            return
        self._idle, self._wanted = 0, 0
        keep, common = min(self.rows, rows), min(self.capacity, capacity)
        self.generation += 1
        if wanted == self.rows and self._room(capacity) == self._room(self.capacity):
            self.tensors = [self._move_apart(tensor, capacity, keep) for tensor in self.tensors]
            self.capacity = capacity
            return
        try:
            for i, old in enumerate(self.tensors):  # one at a time, so that the peak is one tensor more
                new = self._empty(self.shapes[i], wanted, capacity)
                new[:keep, :, :common] = old[:keep, :, :common]
                self.tensors[i] = new
        except MemoryError:  # half of them have moved: start afresh; who catches this has lost what the caches held
            wanted, capacity = 1, self.step
            self.tensors = [self._empty(shape, wanted, capacity) for shape in self.shapes]
            raise
        finally:
            self.rows, self.capacity = wanted, capacity

    def move_row(self, source: int, destination: int, length: int) -> None:
        """Copies the first `length` positions of row `source` over row `destination`."""
        if source == destination or length == 0:
            return
        for tensor in self.tensors:
            tensor[destination, :, :length] = tensor[source, :, :length]

    @property
    def nbytes(self) -> int:
        return sum(tensor.base.nbytes for tensor in self.tensors)

    def view(self, index: int, first_row: int, rows: int) -> ndarray:
        """[rows, H_kv, capacity, D] of cache `index`, contiguous, no copy."""
        return self.tensors[index][first_row : first_row + rows]
