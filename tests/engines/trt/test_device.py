"""Asking for a GPU where there is none, and where the runtime says there is one (its answers are made up here)."""

from __future__ import annotations

import sys

import pytest

from engines.trt.device import gpu_capability

cudart = pytest.importorskip("cuda.bindings.runtime")
OK, MISSING = cudart.cudaError_t.cudaSuccess, cudart.cudaError_t.cudaErrorNoDevice


def test_the_real_runtime_answers():
    """None without a driver (as here), "9.0" or the like with one."""
    answer = gpu_capability()
    assert answer is None or float(answer) >= 5


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert gpu_capability() is None


@pytest.mark.parametrize(
    "devices, index, answer", [((OK, 1), 0, "8.9"), ((OK, 1), 1, None), ((OK, 0), 0, None), ((MISSING, None), 0, None)]
)
def test_the_answer_is_read(monkeypatch, devices, index, answer):
    values = {
        cudart.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor: 8,
        cudart.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor: 9,
    }
    monkeypatch.setattr(cudart, "cudaGetDeviceCount", lambda: devices)
    monkeypatch.setattr(cudart, "cudaDeviceGetAttribute", lambda attribute, device: (OK, values[attribute]))
    assert gpu_capability(index) == answer


def test_an_attribute_that_fails(monkeypatch):
    monkeypatch.setattr(cudart, "cudaGetDeviceCount", lambda: (OK, 1))
    monkeypatch.setattr(cudart, "cudaDeviceGetAttribute", lambda attribute, device: (MISSING, None))
    assert gpu_capability() is None
