"""Memory that ONNX Runtime allocates on a device, arrays and key-value caches in it.

Knows: addresses, copies. Refuses to know: sessions, engines. On a GPU the copies are the CUDA runtime's, on stream 0;
ONNX Runtime computes on another: `wait` before a run, and a run has ended when it returns. Has never run on a GPU.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy import ndarray

from .arrays import Rows
from .caches import bucket
from .devices import Device

GROWTH = 256  # cache positions: a growth copies every cache


class Memory:
    """Allocations on `device` and copies between addresses; host addresses are addresses too."""

    def __init__(self, device: Device):
        self.device, self._cuda, self._copying = device, None, False
        if device.kind == "cuda":
            from cuda.bindings import runtime

            self._cuda = runtime
            self._check(runtime.cudaSetDevice(device.index))

    def empty(self, size: int, dtype: np.dtype) -> ort.OrtValue:
        """`size` values, uninitialised. Raises MemoryError, one sentence."""
        try:
            return ort.OrtValue.ortvalue_from_shape_and_type([max(size, 1)], dtype.type, *self._where)
        except Exception as error:  # ONNX Runtime raises its own unrelated types
            size = size * dtype.itemsize / 1e6
            raise MemoryError(f"{self.device} has no room for {size:.1f} MB more; serve fewer requests.") from error

    def zeros(self, size: int, dtype: np.dtype) -> ort.OrtValue:
        value = self.empty(size, dtype)
        value.update_inplace(np.zeros(max(size, 1), dtype))
        return value

    def copy(self, destination: int, source: int, size: int) -> None:
        """`size` bytes; the two places do not overlap."""
        self.copy_rows(destination, size, source, size, size, 1)

    def copy_rows(self, destination: int, step: int, source: int, source_step: int, width: int, height: int) -> None:
        """`height` rows of `width` bytes, `step` and `source_step` bytes apart."""
        if not width or not height:
            return
        if self._cuda is None:
            for row in range(height):
                ctypes.memmove(destination + row * step, source + row * source_step, width)
            return
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        self._check(self._cuda.cudaMemcpy2DAsync(destination, step, source, source_step, width, height, kind, 0))
        self._copying = True

    def wait(self) -> None:
        """Until all copies are done."""
        if self._copying:
            self._check(self._cuda.cudaStreamSynchronize(0))
            self._copying = False

    @property
    def _where(self) -> tuple[str, int]:
        return self.device.kind, self.device.index

    def _check(self, answer: tuple) -> None:
        if answer[0]:
            raise RuntimeError(f"{self.device}: CUDA answered {answer[0].name}.")


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A C-contiguous array in device memory (engines/arrays.py says what callers use of one). `owner`: the allocation,
    kept alive. Valid until the next call of the engine whose output it is, unless it is a copy."""

    memory: Memory
    owner: ort.OrtValue
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def new(cls, memory: Memory, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        owner = memory.empty(math.prod(shape), dtype)
        return cls(memory, owner, owner.data_ptr(), shape, dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> DeviceArray:
        """A row, or neighbouring rows, of the first axis: a view."""
        step = math.prod(self.shape[1:]) * self.dtype.itemsize
        if isinstance(rows, slice):
            first, last, stride = rows.indices(len(self))
            if stride != 1:
                raise IndexError(f"rows {rows} are not neighbours; a device array gives neighbouring rows.")
            shape = (max(last - first, 0), *self.shape[1:])
        else:
            first, shape = range(len(self))[rows], self.shape[1:]
        return DeviceArray(self.memory, self.owner, self.address + first * step, shape, self.dtype)

    def copy(self) -> DeviceArray:
        new = DeviceArray.new(self.memory, self.shape, self.dtype)
        self.memory.copy(new.address, self.address, self.nbytes)
        return new

    def numpy(self) -> ndarray:
        """Copied to the host, and waited for."""
        host = np.empty(self.shape, self.dtype)
        self.memory.copy(host.ctypes.data, self.address, self.nbytes)
        self.memory.wait()
        return host

    def fill(self, pieces: Rows) -> None:
        """The rows of all pieces, from the host or the device, one after the other; what is beyond them stays."""
        address = self.address
        for piece in pieces.pieces:
            piece = np.ascontiguousarray(piece) if isinstance(piece, ndarray) else piece
            size, source = piece.nbytes, piece.ctypes.data if isinstance(piece, ndarray) else piece.address
            self.memory.copy(address, source, size)
            address += size
        self.memory.wait()  # host pieces may go


class DeviceCaches:
    """Linear key-value caches [rows, heads, capacity, head_dim] in device memory, each of its own (heads, head_dim);
    rows a power of two. `generation` changes whenever addresses do. They only grow."""

    def __init__(self, memory: Memory, shapes: Sequence[tuple[int, int]], dtype: str):
        self.memory, self.shapes = memory, tuple(shapes)
        self.dtype, self.rows, self.capacity, self.generation = np.dtype(dtype), 1, GROWTH, 0
        self.values = [self._new(shape, 1, GROWTH) for shape in self.shapes]

    def _new(self, shape: tuple[int, int], rows: int, capacity: int) -> ort.OrtValue:
        # Zeros: a masked position that holds NaN would still poison the softmax's product.
        return self.memory.zeros(rows * math.prod(shape) * capacity, self.dtype)

    def _bytes(self, head_dim: int, positions: int) -> int:
        return positions * head_dim * self.dtype.itemsize

    def ensure(self, rows: int, length: int) -> None:
        """Holds `rows` rows of `length` positions and keeps what is there. Raises MemoryError, and is then empty."""
        capacity = max(self.capacity, -(-bucket(length) // GROWTH) * GROWTH)
        rows = max(self.rows, 1 << (rows - 1).bit_length())
        if (rows, capacity) == (self.rows, self.capacity):
            return
        try:
            for i, (value, (heads, head_dim)) in enumerate(zip(self.values, self.shapes)):
                old, new = self._bytes(head_dim, self.capacity), self._bytes(head_dim, capacity)
                self.values[i] = self._new(self.shapes[i], rows, capacity)  # one at a time: the peak is one cache more
                self.memory.copy_rows(self.values[i].data_ptr(), new, value.data_ptr(), old, old, self.rows * heads)
                self.memory.wait()
        except MemoryError:  # some have moved: start afresh; who catches this has lost what the caches held
            self.values.clear()
            rows, capacity = 1, GROWTH
            self.values = [self._new(shape, rows, capacity) for shape in self.shapes]
            raise
        finally:
            self.rows, self.capacity, self.generation = rows, capacity, self.generation + 1

    def move_row(self, source: int, destination: int, length: int) -> None:
        """Copies the first `length` positions of row `source` over row `destination`."""
        if source == destination:
            return
        for value, (heads, head_dim) in zip(self.values, self.shapes):
            step, width = self._bytes(head_dim, self.capacity), self._bytes(head_dim, length)
            to, of = (value.data_ptr() + row * heads * step for row in (destination, source))
            self.memory.copy_rows(to, step, of, step, width, heads)

    @property
    def nbytes(self) -> int:
        return sum(self.rows * heads * self._bytes(head_dim, self.capacity) for heads, head_dim in self.shapes)

    def place(self, index: int, first_row: int, rows: int) -> tuple[int, tuple[int, ...]]:
        """(address, shape) of rows first_row .. first_row + rows - 1 of cache `index`."""
        heads, head_dim = self.shapes[index]
        address = self.values[index].data_ptr() + first_row * heads * self._bytes(head_dim, self.capacity)
        return address, (rows, heads, self.capacity, head_dim)

    def close(self) -> None:
        self.values.clear()
