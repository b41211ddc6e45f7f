import numpy as np
import pytest

from engines.feeds import check_rows, sizes_of

INPUTS = [("ids", np.dtype(np.int64), ("N",)), ("index", np.dtype(np.int64), ("R", "Q")), ("x", np.dtype("f4"), ("R", 3))]


def feeds(**changes):
    given = {"ids": np.zeros(5, np.int64), "index": np.zeros((2, 4), np.int64), "x": np.zeros((2, 3), np.float32)}
    return {**given, "unused": None, **changes}


def test_symbols_get_their_sizes():
    assert sizes_of("e", INPUTS, feeds()) == {"N": 5, "R": 2, "Q": 4}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ids": np.zeros(5, np.int32)}, "e: ids is int32 .5., expected int64"),
        ({"ids": np.zeros((5, 1), np.int64)}, "e: ids is int64 .5, 1."),
        ({"x": np.zeros((2, 4), np.float32)}, "e: x is .2, 4., expected"),
        ({"x": np.zeros((3, 3), np.float32)}, "e: x is .3, 3., expected .'R', 3. with .*'R': 2"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        sizes_of("e", INPUTS, feeds(**change))


def test_rows_and_capacity():
    check_rows("e", 2, {"R": 2, "C": 64}, 4, 64)
    for first, sizes in ((3, {"R": 2, "C": 64}), (-1, {"R": 2, "C": 64}), (0, {"R": 2, "C": 128})):
        with pytest.raises(ValueError, match="e: rows .* with C = .* do not fit the caches .4 rows, capacity 64"):
            check_rows("e", first, sizes, 4, 64)
