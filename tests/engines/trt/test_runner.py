"""Buckets and recorded launches, arrays of other libraries, and what is there when nobody waits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import engines
from decoding.loop import Loop
from decoding.schedule import Fixed
from engines.arrays import Rows, to_host
from engines.base import ConfidenceBatch, MarkovBatch
from engines.pack import pack_backbone, pack_target
from engines.tensorrt import TensorRtEngines
from engines.trt.array import DeviceArray
from engines.trt.cuda import Cuda
from engines.trt.device import gpu_capability
from tests.decoding.drive import drive, prompts, requests, tokens
from tests.engines.test_engines import feed, random_ids
from tests.engines.trt.double.cudart import Cudart
from tests.engines.trt.double.machine import machine

TEXTS = prompts(8)


def test_a_launch_is_recorded_the_second_time_and_repeated_from_then_on(opened, gpu):
    opened.ensure_capacity(1, 20)
    batch, _, _ = pack_target([[1, 2]], np.array([0]), np.array([1]), opened.target_capacity, 512)
    want, launches = to_host(opened.target(batch).logits), []
    for _ in range(4):
        np.testing.assert_array_equal(to_host(opened.target(batch).logits), want)
        launches.append((opened.recorded["target"], gpu.calls["cudaGraphLaunch"]))
    assert launches == [(1, 0), (1, 1), (1, 2), (1, 3)] and gpu.launches["target"] == 5
    other = replace(batch, token_ids=np.array([3, 4]))
    assert np.abs(to_host(opened.target(other).logits) - want).max() > 0, "a recorded launch reads what is sent now"


def test_recorded_launches_are_bounded_and_the_oldest_goes(planned):
    bundle = engines.Bundle.load(planned)
    with machine() as gpu:
        opened = TensorRtEngines(bundle, graphs=2)
        opened.ensure_capacity(1, 300)
        target = lambda n: opened.target(
            pack_target([[5] * n], np.array([0]), np.array([1]), opened.target_capacity, 512)[0]
        )
        for n in (1, 1, 2, 2, 4, 4):
            target(n)
        assert opened.recorded["target"] == 2 == len(gpu.graphs)
        before = gpu.calls["cudaGraphLaunch"]
        target(4), target(2)
        assert gpu.calls["cudaGraphLaunch"] == before + 2
        target(1)
        assert gpu.calls["cudaGraphLaunch"] == before + 2 and opened.recorded["target"] == 2
        opened.close()
    with machine() as gpu:
        opened = TensorRtEngines(bundle, graphs=0)
        drive(Loop(opened, Fixed(), max_requests=2), requests(TEXTS[:3]))
        assert gpu.calls["cudaStreamBeginCapture"] == 0
        opened.close()


def test_sizes_near_each_other_share_a_launch(opened, gpu):
    opened.ensure_capacity(4, 100)
    for counts in ([5, 5, 4], [5, 4, 4], [5, 5, 3], [5, 5, 5]):
        feed(opened, [random_ids(n) for n in counts], [0, 0, 0])
    assert opened.recorded["target"] == 1


def test_staging_that_grows_drops_what_was_recorded(opened, gpu, plain):
    """The old addresses are gone; the double would see a launch that still used them."""
    todo = requests(TEXTS[:4])
    want = tokens(drive(Loop(plain, Fixed(), max_requests=4), todo))
    assert tokens(drive(Loop(opened, Fixed(), max_requests=4), todo)) == want
    long = requests(prompts(4, low=400, high=401))
    drive(Loop(opened, Fixed(), max_requests=4), long)
    assert gpu.calls["cudaFree"] > 0
    assert tokens(drive(Loop(opened, Fixed(), max_requests=4), todo)) == want


def test_nothing_is_there_before_somebody_waits(opened, gpu):
    """The double runs what is queued only then: a result read past the runner is old."""
    bundle, G = opened.bundle, opened.bundle.draft.block_size
    _, features = feed(opened, [random_ids(6)], [0])
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    batch = pack_backbone([[features]], one * 6, zero, zero, G, opened.draft_capacity, bundle.max_context)
    backbone = opened.backbone(batch)
    block = opened.markov(MarkovBatch.greedy(backbone.hidden, backbone.base_logits, zero, 64))
    early = opened._runners["markov"].pinned[: 8 * G].view(np.int64).copy()
    assert gpu.launches["markov"] == 0 and (early == -1).all()
    assert (block.draft_tokens >= 0).all() and gpu.launches["markov"] == 1
    logits = opened.confidence(ConfidenceBatch(backbone.hidden, block.markov_embeddings)).confidence_logits
    assert np.isfinite(logits).all()


class Foreign:
    """An array of some other library on the same GPU."""

    def __init__(self, array, **changes):
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, len(array.shape)
        self.array, self.__cuda_array_interface__ = array, {**array.__cuda_array_interface__, **changes}


def test_arrays_of_other_libraries_go_in_and_out(opened, gpu):
    _, features = feed(opened, [random_ids(6)], [0])
    zero = np.zeros(1, np.int64)
    batch = pack_backbone([[features]], zero + 6, zero, zero, 4, opened.draft_capacity, 512)
    backbone = opened.backbone(batch)
    about = backbone.hidden.__cuda_array_interface__
    assert about["version"] == 3 and about["typestr"] == "<f4" and about["shape"] == (1, 4, 32)
    assert about["strides"] is None and about["data"] == (backbone.hidden.address, False)
    assert about["stream"] == opened.cuda.handle and backbone.hidden[:0].__cuda_array_interface__["data"][0] == 0
    own = opened.markov(MarkovBatch.greedy(backbone.hidden, backbone.base_logits, zero, 64)).draft_tokens.copy()
    _, other = Cudart(gpu).cudaStreamCreateWithFlags(1)
    foreign = Foreign(backbone.base_logits, stream=int(other), strides=(4 * 40 * 4, 4 * 40, 4))
    uploads = gpu.calls["cudaMemcpyAsync"]
    result = opened.markov(MarkovBatch.greedy(backbone.hidden, foreign, zero, 64))
    assert (result.draft_tokens == own).all() and gpu.calls["cudaStreamWaitEvent"] == 1
    assert gpu.calls["cudaMemcpyAsync"] == uploads + 3  # anchors up, tokens and indices down
    Cudart(gpu).cudaStreamDestroy(other)
    wrong = {
        "mask": (Foreign(backbone.base_logits, mask=1), "has a mask"),
        "strides": (Foreign(backbone.base_logits, strides=(1, 2, 3)), "they must be"),
        "version": (Foreign(backbone.base_logits, version=1), "is version 1"),
    }
    for array, words in wrong.values():
        with pytest.raises(ValueError, match=f"markov: base_logits: .*{words}"):
            opened.markov(MarkovBatch.greedy(backbone.hidden, array, zero, 64))
    assert gpu.downloaded["hidden"] == gpu.downloaded["base_logits"] == 0


@pytest.mark.parametrize("library", ["pycuda", "cupy"])
def test_a_real_librarys_array(library):
    """Our memory as its array and back, without a copy. Needs the library and a GPU."""
    found = pytest.importorskip(library)
    if gpu_capability() is None:
        pytest.skip("there is no GPU")
    cuda, numbers = Cuda(), np.arange(8, dtype=np.float32).reshape(2, 4)
    try:
        address, pinned = cuda.allocate(32, "numbers"), cuda.allocate_pinned(32, "numbers")
        pinned.view(np.float32)[:] = numbers.reshape(-1)
        cuda.upload(address, pinned, 32)
        cuda.synchronize()
        ours = DeviceArray(cuda, address, (2, 4), np.dtype(np.float32), address + 32)
        if library == "cupy":
            theirs = found.asarray(ours)
        else:
            import pycuda.autoprimaryctx  # noqa: F401
            from pycuda.gpuarray import GPUArray

            theirs = GPUArray(ours.shape, ours.dtype, gpudata=ours.address)
        np.testing.assert_array_equal(theirs.get(), numbers)
        assert DeviceArray.of(cuda, theirs, "test").address == address
    finally:
        cuda.close()


def test_rows_on_both_sides_are_put_next_to_each_other(opened):
    """Pieces in host memory and on the GPU, neighbours in memory and not."""
    _, features = feed(opened, [random_ids(9)], [0])
    opened.ensure_capacity(1, 60)
    ids = random_ids(9)
    batch, _, _ = pack_target([ids], np.array([0]), np.array([1]), opened.target_capacity, 512)
    kept = opened.target(batch).features
    pieces = [kept[0:2].copy(), kept[2:3].copy(), features[3:5], kept[5:6], kept[6:9].copy()]
    zero = np.zeros(1, np.int64)
    pack = lambda pieces: pack_backbone([pieces], zero + 9, zero, zero, 4, opened.draft_capacity, 512)
    assert isinstance(pack(pieces).features, Rows)
    got = to_host(opened.backbone(pack(pieces)).base_logits)
    np.testing.assert_allclose(got, to_host(opened.backbone(pack([features])).base_logits), atol=2e-5)


def test_a_device_array_has_few_words(opened):
    opened.ensure_capacity(1, 60)
    batch, _, _ = pack_target([[1, 2, 3]], np.array([0]), np.array([3]), opened.target_capacity, 512)
    logits = opened.target(batch).logits
    whole = logits.numpy()
    assert (logits.shape, logits.ndim, len(logits), logits.dtype) == ((3, 64), 2, 3, np.float32)
    np.testing.assert_array_equal(logits[1:].numpy(), whole[1:])
    np.testing.assert_array_equal(logits[-1].numpy(), whole[-1])
    assert logits[1:].widened(2).address == logits[1:].address and logits.widened(10**6) is None
    with pytest.raises(IndexError):
        logits[3]
    with pytest.raises(TypeError, match="no slices of step 2"):
        logits[::2]
    with pytest.raises(TypeError, match="no pool for copies"):
        logits.copy()
    with pytest.raises((TypeError, ValueError)):
        np.asarray(logits, np.float32)  # nothing crosses to the host unasked
