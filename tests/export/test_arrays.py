"""Arrays that are made when they are written."""

from __future__ import annotations

import numpy as np
import pytest

from export.arrays import Lazy, applied, concatenated


def counted(array: np.ndarray) -> tuple[Lazy, list]:
    made = []
    return Lazy(array.shape, array.dtype, lambda: made.append(1) or array), made


def test_a_lazy_array_is_what_numpy_would_give():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    lazy, made = counted(array)
    both = concatenated([lazy, lazy[:, ::-1]])
    want = np.concatenate([array, array[:, ::-1]])
    halved = applied(lambda a: a / 2, both.T, (4, 6), np.float32).astype(np.float16)
    assert not made  # shapes and dtypes are known before
    assert (both.shape, both.size, both.nbytes, both.ndim, len(both)) == ((6, 4), 24, 96, 2, 6)
    assert (halved.shape, halved.dtype) == ((4, 6), np.float16)
    small = (want.T / 2).astype(np.float16)
    for got, expected in ((both, want), (both.T, want.T), (lazy[:, 1:3], array[:, 1:3]), (halved, small)):
        np.testing.assert_array_equal(np.asarray(got), expected)
    assert np.asarray(halved).flags.c_contiguous and len(made) > 1  # made anew each time, nothing is kept


def test_arrays_that_are_there_stay_arrays():
    array = np.ones((2, 2), np.float32)
    assert concatenated([array]) is array and isinstance(concatenated([array, array]), np.ndarray)
    assert isinstance(applied(np.sqrt, array, (2, 2), np.float32), np.ndarray)


def test_what_was_announced_must_come():
    with pytest.raises(ValueError, match="float32 .2, 3. was announced, float32 .3, 2. came"):
        np.asarray(Lazy((2, 3), np.float32, lambda: np.zeros((3, 2), np.float32)))
