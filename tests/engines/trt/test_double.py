"""The double itself: it sees what a GPU would not tell."""

from __future__ import annotations

import numpy as np
import pytest
from cuda.bindings import runtime as real

import engines
from engines.pack import pack_target
from engines.trt.array import DeviceArray
from engines.trt.cuda import Cuda
from tests.engines.trt.double.gpu import BASE, DoubleError
from tests.engines.trt.double.machine import machine


@pytest.fixture
def raw():
    """(Gpu, Cuda); the test's problems are expected ones."""
    with machine() as gpu:
        cuda = Cuda()
        yield gpu, cuda
        cuda.close()
        gpu.problems.clear()


def test_memory_is_nobodys(raw):
    gpu, cuda = raw
    address = cuda.allocate(1000, "a")
    pinned = cuda.allocate_pinned(1000, "b")
    assert address >= BASE and address % 256 == 0 and (pinned == 0xFF).all()
    with pytest.raises(DoubleError, match="1 bytes too late"):
        cuda.copy(address, address, 1001)
    with pytest.raises(DoubleError, match="is nobody's memory"):
        cuda.copy(address + 4096, address, 1)
    with pytest.raises(DoubleError, match="is pinned memory, not device"):
        cuda.copy(address, pinned.ctypes.data, 8)
    with pytest.raises(DoubleError, match="is nobody's memory"):
        cuda.upload(address, np.zeros(8, np.uint8), 8)  # pageable
    with pytest.raises(DoubleError, match="is device memory, not pinned"):
        cuda.check(cuda.cudart.cudaMemcpyAsync(address, address, 8, real.cudaMemcpyKind(1), cuda.stream), "copy")
    cuda.free(address)
    with pytest.raises(DoubleError, match="was freed"):
        cuda.zero(address, 8)
    assert len(gpu.problems) == 6


def test_work_waits_until_somebody_waits(raw):
    gpu, cuda = raw
    address, pinned, back = cuda.allocate(8, "a"), cuda.allocate_pinned(8, "b"), cuda.allocate_pinned(8, "c")
    pinned[:] = 7
    cuda.upload(address, pinned, 8)
    cuda.download(back, address, 8)
    done = cuda.event()
    cuda.record(done)
    assert (back == 0xFF).all()
    cuda.wait(done, "test")
    assert (back == 7).all() and gpu.downloaded["?"] == 8


def test_pinned_memory_that_changes_too_early(raw):
    gpu, cuda = raw
    address, pinned = cuda.allocate(8, "a"), cuda.allocate_pinned(8, "b")
    cuda.upload(address, pinned, 8)
    pinned[:] = 1
    with pytest.raises(DoubleError, match="changed before its copy ran"):
        cuda.synchronize()


def test_memory_that_is_freed_too_early(raw):
    gpu, cuda = raw
    address = cuda.allocate(8, "a")
    cuda.zero(address, 8)
    with pytest.raises(DoubleError, match="is freed while work is queued"):
        cuda.free(address)
    cuda._memory[address] = 8


def test_leaks_are_told():
    with pytest.raises(AssertionError, match="device memory of 8 bytes"), machine():
        Cuda().allocate(8, "a")


def run(opened):
    opened.ensure_capacity(1, 10)
    batch = pack_target([[1, 2]], np.array([0]), np.array([2]), opened.target_capacity, 512)[0]
    return opened.target(batch)


def spoilt(planned, problem: str, spoil):
    """The problem that a spoilt runner meets."""
    with machine() as gpu:
        opened = engines.load(planned)
        try:
            with pytest.raises(DoubleError, match=problem):
                spoil(opened, gpu)
                for _ in range(3):
                    run(opened)
                    opened.cuda.synchronize()
        finally:
            gpu.problems.clear()
            for stream in gpu.streams.values():
                stream.queue.clear()
            opened.close()
            gpu.problems.clear()


def moved(opened, name, by):
    """The runner's output buffer `name` of the target, elsewhere."""
    buffers = opened._runners["target"].buffers
    b = buffers[name]
    buffers[name] = DeviceArray(b.cuda, b.address + by, b.shape, b.dtype, b.end, pool=b.pool)


def freed(opened, gpu):
    """A recorded launch whose memory is gone."""
    for _ in range(2):
        run(opened)
    opened.cuda.synchronize()
    opened.cuda.free(opened._runners["target"].buffers["logits"].address)


def changed(opened, gpu):
    """A recorded launch whose context was used for something else."""
    for _ in range(2):
        run(opened)
    _, bound = next(iter(opened._runners["target"].graphs._kept.values()))
    bound.context.set_tensor_address("logits", bound.addresses["logits"])


def copied(opened, gpu):
    """Caches whose outputs have memory of their own."""
    bound = opened._runners["target"].bound
    bind = bound.bind
    spare = opened.cuda.allocate(1 << 24, "spare")
    bound.bind = lambda profile, shapes, places: bind(profile, shapes, {**places, "present.0.key": spare})


SPOILT = {
    "not aligned": ("is not aligned", lambda opened, gpu: moved(opened, "logits", 8)),
    "too short": ("too late", lambda opened, gpu: moved(opened, "logits", 80 * 64 * 4 - 256)),
    "freed": ("was freed", freed),
    "changed": ("the context was changed after its launch was recorded", changed),
    "no alias": ("present.0.key does not lie where past_key_values.0.key does", copied),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_a_runner_that_is_spoilt_is_seen(planned, kind):
    spoilt(planned, *SPOILT[kind])
