"""What goes wrong: one clear sentence each, nothing left behind on the GPU, nothing opened that does not fit."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from cuda.bindings import runtime as real

import engines
from decoding.loop import Loop
from decoding.schedule import Fixed
from engines.manifest import BundleError
from engines.pack import pack_target
from engines.trt.cuda import DeviceError, DeviceMemoryError
from tests.decoding.drive import drive, prompts, requests, tokens
from tests.engines.trt.double.cudart import ILLEGAL, NO_MEMORY
from tests.engines.trt.double.machine import machine

TEXTS = prompts(6)


def refusal(kind: type, folder, **gpu) -> str:
    """The sentence with which a bundle is refused; the module has opened no plan."""
    with machine(**gpu) as double, pytest.raises(kind) as error:
        engines.load(folder)
    assert double.calls["cudaMalloc"] == 0 or kind is not BundleError
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


def test_another_gpu(planned):
    text = refusal(BundleError, planned, capability="9.0")
    assert "for compute capability 8.9, this GPU has 9.0; run python -m export --backend tensorrt" in text


def test_another_version(tmp_path, planned):
    folder = shutil.copytree(planned, tmp_path / "copy")
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["tensorrt"]["version"] = "11.3.0"
    file.write_text(json.dumps(manifest))
    assert "compiled by tensorrt 11.3.0, this machine has 11.4.0.106" in refusal(BundleError, folder)
    manifest["tensorrt"] = {**manifest["tensorrt"], "version": "11.4.0.106", "limits": {"requests": 4}}
    file.write_text(json.dumps(manifest))
    assert "tensorrt.limits or tensorrt.profiles is not as the export writes it" in refusal(BundleError, folder)


def test_a_truncated_plan(tmp_path, planned):
    folder = shutil.copytree(planned, tmp_path / "copy")
    file = folder / "plans/sm89/markov.plan"
    file.write_bytes(file.read_bytes()[:-1])
    assert "markov.plan is not the plan the manifest describes (sha256 differs)" in refusal(BundleError, folder)


def test_no_gpu(planned, monkeypatch):
    with machine() as double:
        monkeypatch.setattr("engines.trt.plans.gpu_capability", lambda device: None)
        with pytest.raises(BundleError, match="need an NVIDIA GPU, and there is none here; run python -m export"):
            engines.load(planned)
        assert not double.calls["cudaMalloc"]
    with pytest.raises(BundleError, match="device is 'cpu'"):
        engines.load(planned, device="cpu")


def test_a_plan_that_tensorrt_does_not_open(planned):
    with machine() as gpu:
        gpu.fail("deserialize_cuda_engine", at=3)
        with pytest.raises(DeviceError, match="11.4.0.106 does not open the plan of markov: not a plan."):
            engines.load(planned)


def test_out_of_memory_wherever_it_happens(planned):
    """Every allocation of loading fails once: a sentence with a way out, and nothing is left (`machine` looks)."""
    with machine() as gpu:
        opened = engines.load(planned)
        opened.close()
        total = {name: gpu.calls[name] for name in ("cudaMalloc", "cudaMallocHost")}
        del opened
    assert total["cudaMalloc"] > 20
    for name, count in total.items():
        for at in range(1, count + 1):
            with machine() as gpu:
                gpu.fail(name, at, NO_MEMORY)
                with pytest.raises(DeviceMemoryError, match="takes .* MB of .*; end what else uses the GPU, or export"):
                    engines.load(planned)


def test_a_small_gpu(planned):
    text = refusal(DeviceMemoryError, planned, capacity=2 << 20)
    assert "MB of GPU memory of which" in text and "are free" in text


@pytest.mark.parametrize("at", [1, 2, 9, 40, 80])
def test_an_error_on_the_device_fails_the_requests_and_all_that_follow(planned, at):
    with machine() as gpu:
        opened = engines.load(planned)
        gpu.fail("execution", at, ILLEGAL)
        got = drive(Loop(opened, Fixed(), max_requests=3), requests(TEXTS))
        errors = [o.error for each in got.values() for o in each if o.error]
        assert errors and "cudaErrorIllegalAddress, an illegal memory access" in errors[0]
        assert "failed in or before" in errors[0]
        with pytest.raises(DeviceError, match="These engines failed before .*; load them again in a new process."):
            opened.ensure_capacity(1, 10)
        opened.close()
        for kind in ("allocations", "streams", "events", "graphs"):  # the driver has taken them: nothing to give back
            getattr(gpu, kind).clear()


@pytest.mark.parametrize("engine", ["target", "verify"])
def test_a_launch_that_is_refused_fails_its_requests_only(opened, gpu, plain, engine):
    want = tokens(drive(Loop(plain, Fixed(), max_requests=3), requests(TEXTS)))
    gpu.fail("execute_async_v3", at=1 if engine == "target" else 2)
    got = drive(Loop(opened, Fixed(), max_requests=3), requests(TEXTS))
    failed = [i for i, each in got.items() if each[-1].error]
    assert 1 <= len(failed) <= 3 and f"does not run {engine}: {engine}: told to fail." in got[failed[0]][-1].error
    assert {i: t for i, t in tokens(got).items() if i not in failed} == {i: want[i] for i in want if i not in failed}


def test_launches_that_cannot_be_recorded_are_run(opened, gpu, plain):
    want = tokens(drive(Loop(plain, Fixed(), max_requests=3), requests(TEXTS)))
    gpu.fail("cudaStreamEndCapture", 1, real.cudaError_t.cudaErrorStreamCaptureUnsupported)
    gpu.fail("cudaGraphInstantiate", 2, NO_MEMORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu.failing, "create_execution_context", (2, True))
        assert tokens(drive(Loop(opened, Fixed(), max_requests=3), requests(TEXTS))) == want
    assert not gpu.problems and sum(n == 0 for n in opened.recorded.values()) >= 2


def test_a_shape_outside_the_profiles(opened):
    counts = np.array([90])
    opened.ensure_capacity(1, 100)
    batch, _, _ = pack_target([[1] * 90], np.array([0]), counts, opened.target_capacity, 512)
    with pytest.raises(ValueError, match="target: M is 90, the plan's profile 'prefill' takes 0..80; run less at once"):
        opened.target(batch)
    with pytest.raises(ValueError, match="17 requests of 10 positions do not fit the plans' caches .16 rows of 1088"):
        opened.ensure_capacity(17, 10)
    with pytest.raises(ValueError, match="1 requests of 1089 positions do not fit"):
        opened.ensure_capacity(1, 1089)


def test_closed_engines(opened, gpu):
    drive(Loop(opened, Fixed(), max_requests=2), requests(TEXTS[:2]))
    opened.close()
    opened.close()
    assert not gpu.leaks()
    with pytest.raises(DeviceError, match="these engines are closed; load the bundle again."):
        opened.ensure_capacity(1, 1)
    got = drive(Loop(opened, Fixed(), max_requests=2), requests(TEXTS[:1]))
    assert "these engines are closed" in got[0][-1].error


def test_closing_waits_for_what_is_queued(opened, gpu):
    opened.ensure_capacity(1, 10)
    opened.target(pack_target([[1, 2]], np.array([0]), np.array([1]), opened.target_capacity, 512)[0])
    opened.close()
    assert not gpu.problems and gpu.launches["target"] == 1
