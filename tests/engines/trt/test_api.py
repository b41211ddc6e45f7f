"""Which TensorRT is there, and what it compiles for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from engines.manifest import BundleError
from engines.trt import api as module
from engines.trt.api import Api, BuildError, chosen_capabilities, default_backend, load_api

RTX = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@pytest.fixture()
def tensorrt(monkeypatch):
    """Stands for the full package: a name and a version, which is all that choosing looks at."""
    fake = ModuleType("tensorrt")
    fake.__version__ = "11.4.0"
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return load_api("tensorrt")


def gpu(monkeypatch, capability: str | None) -> None:
    monkeypatch.setattr(module, "gpu_capability", lambda: capability)


def test_rtx_says_what_it_compiles_for():
    api = load_api("tensorrt-rtx")
    assert api.version == "1.7.1.116" and api.capabilities() == RTX and api.crosses and not api.keeps_timings


def test_a_package_that_does_not_load_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        BundleError, match=r"^tensorrt does not load \(.*\); install it with pip install tensorrt-cu13, or"
    ):
        load_api("tensorrt")
    assert default_backend() == "tensorrt-rtx"


def test_tensorrt_is_the_default_where_it_loads(tensorrt):
    assert default_backend() == "tensorrt" and tensorrt.keeps_timings and tensorrt.capabilities() == ()


@pytest.mark.parametrize(
    "here, wanted, chosen", [(None, [], ["8.9"]), ("8.6", [], ["8.6"]), ("8.6", ["8.9", "8.0", "8.9"], ["8.9", "8.0"])]
)
def test_rtx_compiles_for_what_is_asked_or_for_what_is_here(monkeypatch, here, wanted, chosen):
    gpu(monkeypatch, here)
    assert chosen_capabilities(load_api("tensorrt-rtx"), wanted) == chosen


def test_tensorrt_compiles_for_what_is_here(monkeypatch, tensorrt):
    gpu(monkeypatch, "9.0")
    assert chosen_capabilities(tensorrt, []) == chosen_capabilities(tensorrt, ["9.0"]) == ["9.0"]


@pytest.mark.parametrize(
    "backend, here, wanted, words",
    [
        ("tensorrt-rtx", None, ["9.0"], "does not compile for compute capability 9.0, it knows 7.5, 8.0"),
        ("tensorrt-rtx", "9.0", [], "does not compile for compute capability 9.0"),
        ("tensorrt-rtx", None, ["sm89"], "--compute-capability is 'sm89'; it must look like 8.9"),
        ("tensorrt", None, [], "compiles for the GPU of this machine, and there is none; use --backend tensorrt-rtx"),
        ("tensorrt", "9.0", ["8.9"], "compiles for the GPU of this machine (9.0), not for 8.9"),
    ],
)
def test_what_cannot_be_compiled_for_is_one_sentence(monkeypatch, tensorrt, backend, here, wanted, words):
    gpu(monkeypatch, here)
    with pytest.raises(BuildError) as error:
        chosen_capabilities(load_api(backend), wanted)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_tensorrt_is_not_aimed():
    config = SimpleNamespace()
    module.aim(Api("tensorrt", ModuleType("tensorrt"), "11.4.0"), config, "9.0")
    assert not vars(config)
