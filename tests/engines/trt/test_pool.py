import pytest

from engines.trt.cuda import Cuda, DeviceMemoryError
from engines.trt.pool import Pool
from tests.engines.trt.double.machine import machine


@pytest.fixture
def pool():
    with machine():
        cuda = Cuda()
        yield Pool(cuda, "rows", 10, 4)
        cuda.close()


def taken(pool, rows):
    """A copy of so many rows of the pool's own start."""
    from engines.trt.array import DeviceArray

    source = DeviceArray(pool.cuda, pool.start, (rows, 4), pool.dtype, pool.start + 160)
    return pool.copy(source)


def test_rows_come_back_when_the_last_array_is_gone(pool):
    a, b, c = taken(pool, 3), taken(pool, 4), taken(pool, 3)
    assert pool.left == 0 and b.address == a.address + 48
    part = b[1:2]
    del b
    assert pool.left == 0, "a part of it lives"
    del part
    assert pool.free == [(3, 4)]
    del a, c
    assert pool.free == [(0, 10)], "neighbours are joined"
    assert taken(pool, 0).shape == (0, 4) and pool.left == 10


def test_no_stretch_that_is_long_enough(pool):
    rows = [taken(pool, 2) for _ in range(5)]
    del rows[3], rows[1]
    with pytest.raises(DeviceMemoryError, match="rows: no room for 3 rows, 4 of 10 are free; run fewer requests"):
        taken(pool, 3)
    assert pool.left == 4 and taken(pool, 2) is not None
