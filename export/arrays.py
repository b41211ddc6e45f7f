"""Arrays of a graph that are made when they are written: a checkpoint's weights pass through memory one by one.

Knows: shapes and dtypes of what is not there yet, and the few operations that builders and passes apply to weights.
Refuses to know: files, models, ONNX. A Lazy array is made anew each time that it is asked for and never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike


class Lazy:
    """shape and dtype of an array, and the function that makes it. np.asarray(lazy) makes it."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, make: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.make = tuple(shape), np.dtype(dtype), make

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: int(np.prod(self.shape)))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)
    T = property(lambda self: Lazy(self.shape[::-1], self.dtype, lambda: self.make().T))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> np.ndarray:
        array = self.make()
        if (array.shape, array.dtype) != (self.shape, self.dtype):
            raise ValueError(f"an array of {self.dtype} {self.shape} was announced, {array.dtype} {array.shape} came.")
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitem__(self, key) -> Lazy:
        shape = np.broadcast_to(np.zeros((), self.dtype), self.shape)[key].shape
        return Lazy(shape, self.dtype, lambda: self.make()[key])

    def astype(self, dtype: DTypeLike) -> Lazy:
        return Lazy(self.shape, dtype, lambda: self.make().astype(dtype, order="C"))  # C: what a file wants


Array = np.ndarray | Lazy


def concatenated(arrays: Sequence[Array]) -> Array:
    """Along axis 0; one array alone is itself."""
    if len(arrays) == 1:
        return arrays[0]
    if not any(isinstance(a, Lazy) for a in arrays):
        return np.concatenate(arrays)
    shape = (sum(a.shape[0] for a in arrays), *arrays[0].shape[1:])
    return Lazy(shape, arrays[0].dtype, lambda: np.concatenate([np.asarray(a) for a in arrays]))


def applied(make: Callable[[np.ndarray], np.ndarray], array: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """make(array), of this shape and dtype; lazy where the array is."""
    if isinstance(array, Lazy):
        return Lazy(shape, dtype, lambda: make(np.asarray(array)))
    return make(array)
