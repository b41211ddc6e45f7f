import numpy as np
import pytest

from engines.caches import PATIENCE, Caches, bucket


def test_buckets_hold_the_length_and_grow_by_steps():
    assert [bucket(n) for n in (1, 64, 65, 256, 257, 512, 513, 2048, 2049, 4097)] == [64, 64, 128, 256, 320, 512, 640, 2048, 2560, 5120]
    assert all(n <= bucket(n) <= n * 1.25 + 64 for n in range(1, 20000, 37))


def filled():
    caches = Caches([(2, 4), (1, 6)])
    caches.ensure(3, 200)
    for t in caches.tensors:
        t[:] = np.random.default_rng(0).normal(size=t.shape)
    return caches


def test_growing_keeps_every_row():
    caches = filled()
    before, generation = [t.copy() for t in caches.tensors], caches.generation
    caches.ensure(5, 300)
    assert caches.rows >= 5 and caches.capacity == 320 and caches.generation > generation
    for old, new in zip(before, caches.tensors):
        np.testing.assert_array_equal(new[: len(old), :, :256], old)
        assert not new[:, :, 256:].any(), "new positions must be finite: a masked NaN would poison the softmax"


@pytest.mark.parametrize("first, second", [(60, 200), (200, 60)], ids=["grows", "shrinks"])
def test_a_step_within_the_room_moves_every_row_in_place(first, second):
    caches = Caches([(2, 4), (1, 6)])
    caches.ensure(3, first)
    for t in caches.tensors:
        t[:] = np.random.default_rng(0).normal(size=t.shape)
    before, pointers, generation = [t.copy() for t in caches.tensors], [t.ctypes.data for t in caches.tensors], caches.generation
    for _ in range(PATIENCE):
        caches.ensure(3, second)
    assert caches.capacity == bucket(second) and caches.generation > generation
    assert pointers == [t.ctypes.data for t in caches.tensors]
    common = min(bucket(first), bucket(second))
    for old, new in zip(before, caches.tensors):
        np.testing.assert_array_equal(new[:3, :, :common], old[:3, :, :common])
        assert np.isfinite(new).all()


def test_ensure_without_need_moves_nothing():
    caches = filled()
    pointers, generation = [t.ctypes.data for t in caches.tensors], caches.generation
    caches.ensure(2, 256)
    assert pointers == [t.ctypes.data for t in caches.tensors] and generation == caches.generation


def test_shrinks_only_after_a_while_and_keeps_the_rest():
    caches = filled()
    caches.ensure(3, 1000)
    assert caches.capacity == 1024
    before = [t[:, :, :256].copy() for t in caches.tensors]
    for _ in range(PATIENCE - 1):
        caches.ensure(3, 100)
    assert caches.capacity == 1024
    caches.ensure(3, 100)
    assert caches.capacity == 128
    for old, new in zip(before, caches.tensors):
        np.testing.assert_array_equal(new, old[:, :, :128])


def test_move_row_copies_the_length_only():
    caches = filled()
    before = [t.copy() for t in caches.tensors]
    caches.move_row(2, 0, 7)
    for old, new in zip(before, caches.tensors):
        np.testing.assert_array_equal(new[0, :, :7], old[2, :, :7])
        np.testing.assert_array_equal(new[0, :, 7:], old[0, :, 7:])
        np.testing.assert_array_equal(new[1:], old[1:])


@pytest.mark.parametrize("first, rows", [(0, 2), (1, 2), (2, 1)])
def test_views_are_contiguous_memory_of_the_buffer(first, rows):
    view = filled().view(0, first, rows)
    assert view.shape == (rows, 2, 256, 4) and view.flags.c_contiguous and not view.flags.owndata


def test_without_memory_it_is_empty_but_usable():
    caches = filled()
    honest, calls = caches._empty, []

    def empty(shape, rows, capacity):
        calls.append(capacity)
        if len(calls) == 2:
            raise MemoryError
        return honest(shape, rows, capacity)

    caches._empty = empty
    with pytest.raises(MemoryError):
        caches.ensure(3, 1000)
    assert [t.shape for t in caches.tensors] == [(1, 2, 64, 4), (1, 1, 64, 6)] and (caches.rows, caches.capacity) == (1, 64)
    caches.ensure(3, 1000)
    assert [t.shape for t in caches.tensors] == [(4, 2, 1024, 4), (4, 1, 1024, 6)]
