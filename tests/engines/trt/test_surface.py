"""Every TensorRT name, member and keyword argument that our source uses exists: in TensorRT 11.4 and in TensorRT-RTX.

TensorRT itself cannot run without its library and a GPU; its bindings can be looked at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.engines.trt.surface import parameters, stub_libraries, surface, uses, wrong

ROOM = Path(__file__).parents[3] / "engines" / "trt"
CALLERS = ("api.py", "build.py", "log.py")
RTX_ONLY = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}  # behind Api.crosses


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory):
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: the stub libraries that tensorrt_bindings needs cannot be made")
    return surface("tensorrt_bindings", stub_libraries(tmp_path_factory.mktemp("stubs")))


@pytest.fixture(scope="module")
def rtx():
    return surface("tensorrt_rtx")


def test_the_bindings_are_those_of_the_production_version(tensorrt):
    assert tensorrt["version"].startswith("11.4.")
    assert "build_serialized_network" in tensorrt["names"]["Builder"] and "FP16" not in tensorrt["names"]["BuilderFlag"]


def test_what_calls_tensorrt_is_walked():
    calling = {path.name for path in ROOM.glob("*.py") if "trt." in path.read_text().replace("engines.trt.", "")}
    assert calling <= {*CALLERS, "__init__.py"}
    members = {use.member for name in CALLERS for use in uses((ROOM / name).read_text())}
    assert {
        "Builder",
        "build_serialized_network",
        "parse_from_file",
        "set_shape_input",
        "decomposable",
        "step_complete",
    } <= members


@pytest.mark.parametrize("name", CALLERS)
def test_every_use_exists_in_tensorrt_11(tensorrt, name):
    found = uses((ROOM / name).read_text())
    special = {use.member for use in found if use.member in RTX_ONLY or use.owner == ("ComputeCapability",)}
    assert not special or name == "api.py"
    assert not [why for use in found if use.member not in special and (why := wrong(use, tensorrt))]


@pytest.mark.parametrize("name", CALLERS)
def test_every_use_exists_in_tensorrt_rtx(rtx, name):
    assert not [why for use in uses((ROOM / name).read_text()) if (why := wrong(use, rtx))]


def test_what_only_rtx_has_is_not_in_tensorrt(tensorrt, rtx):
    for known, there in ((tensorrt, False), (rtx, True)):
        every = set(known["names"]) | set(known["names"]["IBuilderConfig"])
        assert {name in every for name in RTX_ONLY} == {there}


GONE = {
    "config.max_workspace_size = 1": "max_workspace_size does not exist",
    "config.set_flag(trt.BuilderFlag.FP16)": "BuilderFlag.FP16 does not exist",
    "builder.build_engine(network, config)": "build_engine does not exist",
    "trt.Dims64((1,))": "Dims64 does not exist",
    "parser.parse_from_file(path='x')": "takes [['model']]",
    "builder.build_serialized_network(network, config, None, 4)": "it is given 4",
    "class M(trt.IProgressMonitor):\n    def step_done(self, phase_name, step): pass": "step_done does not exist",
    "class M(trt.IProgressMonitor):\n    def step_complete(self, phase, step): pass": "it is given 0 and ['phase'",
}


@pytest.mark.parametrize("source", GONE)
def test_the_gate_sees_what_is_wrong(tensorrt, source):
    found = [why for use in uses(source) if (why := wrong(use, tensorrt))]
    assert len(found) == 1 and GONE[source] in found[0]


def test_parameters_of_overloads():
    doc = "f(*args, **kwargs)\nOverloaded function.\n\n1. f(self: T, a: int, b: dict[int, str] = {}) -> int\n\n"
    doc += "2. f(self: T) -> int\n"
    assert parameters(doc) == [["a", "b"], []]
    assert parameters(None) is parameters("f(*args, **kwargs)\n") is None
