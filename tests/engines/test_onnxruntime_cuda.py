"""The engines of a GPU provider, run on the CPU: the same code, addresses and copies, without the GPU."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

import engines
from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from decoding.schedule import make
from engines import BundleError, onnxruntime_cuda
from engines.__main__ import app
from engines.arrays import Rows
from engines.assignment import Node
from engines.bundle import Bundle
from engines.device_memory import GROWTH, DeviceArray, DeviceCaches, Memory
from engines.devices import Device
from engines.onnxruntime_cuda import DeviceEngines
from engines.pack import pack_target
from engines.profile import profile

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def on_device(bundle):
    loaded = DeviceEngines(Bundle.load(bundle), Device("cpu"), threads=1)
    yield loaded
    loaded.close()


def decode(loaded, schedule: str, params: list[SamplingParams]) -> list[list[int]]:
    loop = Loop(loaded, make(schedule), max_requests=3, token_budget=16)
    ids = {i: [] for i in range(len(params))}
    for i, each in enumerate(params):
        loop.add(Request(i, tuple(RNG.integers(0, 60, 5 + 9 * i).tolist() if i else (3, 1, 4)), each))
    while loop.has_work:
        for output in loop.step():
            assert output.finish_reason != "error", output.error
            ids[output.request_id] += output.token_ids
    return list(ids.values())


@pytest.mark.parametrize("schedule", ["none", "fixed"])
def test_a_whole_decode_is_the_cpus(on_device, loaded, schedule):
    """Greedy, drawn, coupled and filtered requests in one batch, more of them than slots: rows move, caches grow."""
    global RNG
    params = [
        SamplingParams(300, ignore_eos=True),
        SamplingParams(40, temperature=0.8, seed=3, ignore_eos=True),
        SamplingParams(60, temperature=1.0, seed=4, accept="coupled", ignore_eos=True),
        SamplingParams(50, temperature=1.0, seed=5, top_k=20, top_p=0.9, return_log_probs=True, ignore_eos=True),
        SamplingParams(30, repetition_penalty=1.3, ignore_eos=True),
    ]
    RNG = np.random.default_rng(1)
    want = decode(loaded, schedule, params)
    RNG = np.random.default_rng(1)
    assert decode(on_device, schedule, params) == want
    assert on_device.target_capacity > GROWTH


def test_only_ids_counts_and_statistics_come_to_the_host(on_device):
    on_device.ensure_capacity(1, 60)
    batch, _, _ = pack_target([[1, 2, 3]], np.array([0]), np.array([2]), on_device.target_capacity, 512)
    result = on_device.target(batch)
    assert isinstance(result.logits, DeviceArray) and isinstance(result.features, DeviceArray)
    outputs = {name for graph in on_device._graphs.values() for name, _, _ in graph.outputs}
    assert outputs - onnxruntime_cuda.TO_HOST == {
        "logits", "features", "hidden", "base_logits", "draft_probs", "markov_embeddings"
    }  # fmt: skip


def test_caches_are_updated_in_place(on_device):
    """What a pass has written is at the caches' own addresses."""
    on_device.ensure_capacity(1, 60)
    caches = on_device.target_caches
    batch, _, _ = pack_target([[7, 8, 9]], np.array([0]), np.array([1]), on_device.target_capacity, 512)
    addresses = [v.data_ptr() for v in caches.values]
    caches.values[0].update_inplace(np.zeros(caches.values[0].shape(), np.float32))
    on_device.target(batch)
    assert [v.data_ptr() for v in caches.values] == addresses
    heads, head_dim = caches.shapes[0]
    shape = (caches.rows, heads, caches.capacity, head_dim)
    written = np.abs(caches.values[0].numpy().reshape(shape)).sum((1, 3))[0]
    assert (written[:3] > 0).all() and not written[3:].any()


def test_what_does_not_fit_is_refused(on_device):
    on_device.ensure_capacity(1, 60)
    batch, _, _ = pack_target([[1, 2]], np.array([0]), np.array([1]), on_device.target_capacity + 64, 512)
    with pytest.raises(ValueError, match="do not fit the caches"):
        on_device.target(batch)


def test_closed_engines_say_so(bundle):
    loaded = DeviceEngines(Bundle.load(bundle), Device("cpu"), threads=1)
    loaded.close()
    with pytest.raises(RuntimeError, match="^markov is called on engines that are closed.$"):
        loaded.markov(type("B", (), {})())


def test_a_build_without_cuda_is_named(bundle):
    assert "CUDAExecutionProvider" not in ort.get_available_providers(), "these tests want the CPU build"
    with pytest.raises(BundleError, match="is a build without CUDA; replace it: pip uninstall -y onnxruntime ") as error:
        engines.load(bundle, device="cuda")
    assert "\n" not in str(error.value)


def test_a_provider_that_does_not_start_is_named(bundle, tmp_path):
    """ONNX Runtime falls back to the CPU without an error, here as on a machine whose driver is missing."""
    path = bundle / "onnx" / "confidence" / "model.onnx"
    with pytest.warns(UserWarning), pytest.raises(BundleError, match="CUDA provider does not start on cuda:1: no GPU"):
        onnxruntime_cuda.open_session(path, Device("cuda", 1), onnxruntime_cuda.CUDA, 1)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot open .* on cpu: "):
        onnxruntime_cuda.open_session(tmp_path / "model.onnx", Device(), onnxruntime_cuda.CPU, 1)


def test_a_fallen_node_ends_the_load(bundle, monkeypatch):
    fallen = (Node("x", "MatMul", "SlowExecutionProvider"),)
    monkeypatch.setattr(onnxruntime_cuda, "nodes_of", lambda subgraphs: fallen)
    with pytest.raises(BundleError, match=r"target: node x \(MatMul\) runs on SlowExecutionProvider, not on CPU"):
        DeviceEngines(Bundle.load(bundle), Device("cpu"), threads=1)


# Memory.


def array(values: np.ndarray) -> DeviceArray:
    made = DeviceArray.new(Memory(Device()), values.shape, values.dtype)
    made.fill(Rows([values]))
    return made


def test_arrays_views_and_copies():
    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    a = array(values)
    assert (a.ndim, len(a), a.nbytes) == (3, 4, 96)
    np.testing.assert_array_equal(a[1:3].numpy(), values[1:3])
    np.testing.assert_array_equal(a[-1].numpy(), values[-1])
    np.testing.assert_array_equal(a[2:][1][2].numpy(), values[3][2])
    assert len(a[3:1]) == 0 and a[3:1].numpy().shape == (0, 3, 2)
    kept = a[1:].copy()
    a.fill(Rows([values + 100]))
    np.testing.assert_array_equal(kept.numpy(), values[1:])
    np.testing.assert_array_equal(a[0].numpy(), values[0] + 100)
    with pytest.raises(IndexError):
        a[4]
    with pytest.raises(IndexError, match="neighbouring rows"):
        a[::2]


def test_pieces_from_both_sides_are_put_together():
    rows = [np.full((n, 2), n, np.float32) for n in (3, 1, 2)]
    whole = DeviceArray.new(Memory(Device()), (6, 2), np.dtype(np.float32))
    whole.fill(Rows([rows[0], array(rows[1]), rows[2]]))
    np.testing.assert_array_equal(whole.numpy(), np.concatenate(rows))


def test_caches_grow_with_what_they_hold_and_rows_move():
    caches = DeviceCaches(Memory(Device()), [(2, 6), (3, 4)], dtype="float32")
    read = lambda i: caches.values[i].numpy().reshape(caches.rows, 3, caches.capacity, 4)
    caches.ensure(2, 10)
    held = np.random.default_rng(0).random((2, 3, GROWTH, 4), np.float32)
    caches.values[1].update_inplace(held.reshape(-1))
    before = caches.generation
    caches.ensure(2, GROWTH)
    assert caches.generation == before
    caches.ensure(3, GROWTH + 1)
    assert (caches.rows, caches.capacity) == (4, 2 * GROWTH) and caches.generation > before
    np.testing.assert_array_equal(read(1)[:2, :, :GROWTH], held)
    assert not read(1)[2:].any() and not read(1)[:, :, GROWTH:].any()
    caches.move_row(1, 3, 7)
    np.testing.assert_array_equal(read(1)[3, :, :7], held[1, :, :7])
    assert not read(1)[3, :, 7:].any()
    assert caches.nbytes == 4 * (2 * 6 + 3 * 4) * 2 * GROWTH * 4


def test_no_room_is_one_sentence_and_leaves_caches_that_work(monkeypatch):
    memory = Memory(Device())
    with pytest.raises(MemoryError, match=r"^cpu has no room for .* MB more; serve fewer requests.$"):
        memory.empty(1 << 58, np.dtype(np.float32))
    caches = DeviceCaches(memory, [(3, 4), (2, 6)], dtype="float32")
    with pytest.raises(MemoryError):
        caches.ensure(1 << 30, 1 << 20)
    assert (caches.rows, caches.capacity, len(caches.values)) == (1, GROWTH, 2)
    caches.ensure(2, 300)


def test_the_profile_measures_these_engines_too(on_device):
    table = profile(on_device, requests=(1, 2), contexts=(16,), quick=True, seconds=0.2, write=False)
    assert table["provider"] == on_device.provider and table["target"] and table["draft"]


def test_commands_end_in_one_sentence_without_a_gpu(bundle):
    done = CliRunner().invoke(app, ["profile", "--bundle", str(bundle), "--device", "cuda"])
    assert done.exit_code == 1
    done = CliRunner().invoke(app, ["profile", "--bundle", str(bundle), "--device", "gpu"])
    assert done.exit_code == 1 and "device is 'gpu'; it must be cpu, cuda or cuda:N." in done.output
