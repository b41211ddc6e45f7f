import numpy as np

from engines.arrays import Rows, concatenate, to_host


class Elsewhere:
    """An array that is not numpy's."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim

    def __len__(self):
        return len(self.array)

    def numpy(self):
        return self.array


A, B = np.ones((2, 3), np.float32), np.zeros((4, 3), np.float32)


def test_numpy_pieces_become_one_array():
    assert concatenate([A, B]).shape == (6, 3) and isinstance(concatenate([A, B]), np.ndarray)


def test_other_pieces_stay_where_they_are():
    pieces = [A, Elsewhere(B)]
    rows = concatenate(pieces)
    assert isinstance(rows, Rows) and rows.pieces is pieces
    assert (rows.shape, rows.dtype, rows.ndim, len(rows)) == ((6, 3), np.float32, 2, 6)
    assert Rows(pieces, 8).shape == (8, 3)


def test_checks_read_numbers():
    assert to_host(A) is A and to_host(Elsewhere(B)) is B
