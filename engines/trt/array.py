"""An array in GPU memory, which other libraries take and give without a copy (__cuda_array_interface__, version 3).

Knows: address, shape, type, whose memory it is. Refuses to know: what the numbers mean, engines.

pycuda, cupy, numba and torch arrays have the interface too: DeviceArray.of takes any of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray

from .cuda import Cuda

VERSION = 3


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """C-contiguous. `end`: one past the last byte of its allocation; `owner`: whatever must live as long as it does;
    `pool`: where copies of it go, None = it cannot be copied on the GPU. Valid until the next call of the engine whose
    output it is, unless it is a copy."""

    cuda: Cuda
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    end: int
    owner: object = None
    pool: object = None

    @classmethod
    def of(cls, cuda: Cuda, array: object, what: str) -> DeviceArray:
        """`array` as it is, or a view of what its interface describes, whose stream ours then waits for.

        Raises ValueError, one sentence that begins with `what`, for strides, a mask or another version."""
        if isinstance(array, cls):
            return array
        about = array.__cuda_array_interface__
        shape, dtype = tuple(about["shape"]), np.dtype(about["typestr"])
        wanted = contiguous(shape, dtype.itemsize)
        if about.get("mask") is not None:
            raise ValueError(f"{what}: its __cuda_array_interface__ has a mask, which is not taken.")
        if (strides := about.get("strides")) is not None and math.prod(shape) and tuple(strides) != wanted:
            raise ValueError(f"{what}: its strides are {tuple(strides)}, they must be {wanted} (C-contiguous).")
        if about["version"] < 2:
            raise ValueError(f"{what}: its __cuda_array_interface__ is version {about['version']}; it must be 2 or 3.")
        if (stream := about.get("stream")) is not None:
            cuda.follow(stream)
        address = about["data"][0] or 0
        return cls(cuda, address, shape, dtype, address + dtype.itemsize * math.prod(shape), owner=array)

    @property
    def __cuda_array_interface__(self) -> dict:
        return {
            "version": VERSION,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.size else 0, False),
            "strides": None,
            "stream": self.cuda.handle,  # whoever reads it waits for this stream
        }

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Of one index of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> DeviceArray:
        """A row, or neighbouring rows, of the first axis; no copy. Raises IndexError or TypeError for anything else."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise TypeError(f"an array on the GPU has no slices of step {step}; take neighbouring rows.")
            shape = (max(stop - start, 0), *self.shape[1:])
        else:
            start, shape = range(len(self))[index], self.shape[1:]
        return replace(self, address=self.address + start * self.row_bytes, shape=shape)

    def widened(self, rows: int) -> DeviceArray | None:
        """The same start with `rows` rows, the others holding what lies there; None where its memory ends before."""
        if self.address + rows * self.row_bytes > self.end:
            return None
        return replace(self, shape=(rows, *self.shape[1:]))

    def copy(self) -> DeviceArray:
        """The same numbers in memory of its pool's, taken on the stream. Raises TypeError without a pool."""
        if self.pool is None:
            raise TypeError("this array on the GPU has no pool for copies; numpy() copies it to the host.")
        return self.pool.copy(self)

    def numpy(self) -> ndarray:
        """A copy on the host, waited for. Meant for tests and checks: a decode round never calls it."""
        self.cuda.enter()
        array = np.empty(self.shape, self.dtype)
        if array.size:
            pinned = self.cuda.allocate_pinned(array.nbytes, "a copy of an array on the GPU")
            try:
                self.cuda.download(pinned, self.address, array.nbytes)
                self.cuda.synchronize()
                array[...] = pinned.view(self.dtype).reshape(self.shape)
            finally:
                if not self.cuda.failure:
                    self.cuda.free_pinned(pinned)
        return array


def contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """C strides in bytes."""
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
