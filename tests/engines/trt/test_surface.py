"""Every TensorRT name, member and keyword argument that our source uses exists: in TensorRT 11.4 and in TensorRT-RTX.

TensorRT itself cannot run without its library and a GPU; its bindings can be looked at."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import pytest
from cuda.bindings import runtime as cudart

from tests.engines.trt.double.cudart import Cudart
from tests.engines.trt.double.tensorrt import Context, Engine
from tests.engines.trt.surface import cudart_uses, parameters, stub_libraries, surface, uses, wrong

ROOM = Path(__file__).parents[3] / "engines" / "trt"
CALLERS = ("api.py", "build.py", "context.py", "log.py", "runner.py", "../tensorrt.py")
RTX_ONLY = {
    "ComputeCapability",
    "num_compute_capabilities",
    "set_compute_capability",
    "CudaGraphStrategy",
    "cuda_graph_strategy",
}  # behind Api.crosses
RTX_ENUMS = {("ComputeCapability",), ("CudaGraphStrategy",)}


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
        "build_serialized_network_to_stream",
        "parse_from_file",
        "set_shape_input",
        "decomposable",
        "step_complete",
        "Runtime",
        "deserialize_cuda_engine",
        "create_execution_context",
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "set_device_memory",
        "execute_async_v3",
        "get_aliased_input_tensor",
        "device_memory_size_v2",
        "get_tensor_location",
    } <= members


@pytest.mark.parametrize("name", CALLERS)
def test_every_use_exists_in_tensorrt_11(tensorrt, name):
    found = uses((ROOM / name).read_text())
    special = {use.member for use in found if use.member in RTX_ONLY or use.owner in RTX_ENUMS}
    assert not special or name == "api.py"
    assert not [why for use in found if use.member not in special and (why := wrong(use, tensorrt))]


@pytest.mark.parametrize("name", CALLERS)
def test_every_use_exists_in_tensorrt_rtx(rtx, name):
    assert not [why for use in uses((ROOM / name).read_text()) if (why := wrong(use, rtx))]


def test_what_only_rtx_has_is_not_in_tensorrt(tensorrt, rtx):
    for known, there in ((tensorrt, False), (rtx, True)):
        names = known["names"]
        every = {*names, *names["IBuilderConfig"], *names["IRuntimeConfig"]}
        assert {name in every for name in RTX_ONLY} == {there}


GONE = {
    "config.max_workspace_size = 1": "max_workspace_size does not exist",
    "config.set_flag(trt.BuilderFlag.FP16)": "BuilderFlag.FP16 does not exist",
    "builder.build_engine(network, config)": "build_engine does not exist",
    "trt.Dims64((1,))": "Dims64 does not exist",
    "parser.parse_from_file(path='x')": "takes [['model']]",
    "builder.build_serialized_network(network, config, None, 4)": "it is given 4",
    "context.execute_async_v2([], 0)": "execute_async_v2 does not exist",
    "engine.device_memory_size": "device_memory_size does not exist",
    "engine.create_execution_context(1, 2)": "it is given 2",
    "self.api.trt.Runtime(logger, 1)": "it is given 2",
    "class M(trt.IProgressMonitor):\n    def step_done(self, phase_name, step): pass": "step_done does not exist",
    "class M(trt.IProgressMonitor):\n    def step_complete(self, phase, step): pass": "it is given 0 and ['phase'",
}


@pytest.mark.parametrize("source", GONE)
def test_the_gate_sees_what_is_wrong(tensorrt, source):
    found = [why for use in uses(source) if (why := wrong(use, tensorrt))]
    assert len(found) == 1 and GONE[source] in found[0]


def cuda_misfit(name: str, member: str, arguments: int | None) -> str | None:
    """Why a use of cuda.bindings.runtime does not fit; None where it does."""
    found = getattr(cudart, name, None)
    if found is None or (member and not hasattr(found, member)):
        return f"{name}.{member} does not exist"
    if arguments is not None and arguments != (wanted := len(inspect.signature(found).parameters)):
        return f"{name} takes {wanted} arguments, it is given {arguments}"
    return None


def test_every_cuda_call_exists():
    """The module imports without a driver."""
    found = [use for path in ROOM.glob("*.py") for use in cudart_uses(path.read_text())]
    assert len({name for name, _, _ in found}) > 25 and not [why for use in found if (why := cuda_misfit(*use))]
    wrong_ones = "cudart.cudaMalocHost(1)", "self.cudart.cudaMemcpyAsync(1, 2)", "cudart.cudaMemcpyKind.cudaMemcpyUp"
    assert all(cuda_misfit(*cudart_uses(source)[0]) for source in wrong_ones)


def test_the_double_takes_what_the_real_functions_take():
    functions = {name: f for name, f in vars(Cudart).items() if name.startswith("cuda") and hasattr(f, "arguments")}
    used = {name for path in ROOM.glob("*.py") for name, _, calls in cudart_uses(path.read_text()) if calls is not None}
    assert used <= functions.keys()
    for name, f in functions.items():
        assert len(inspect.signature(getattr(cudart, name)).parameters) == f.arguments, name


def test_the_doubles_tensorrt_has_no_member_of_its_own(tensorrt):
    """Whatever the runner may call on it is TensorRT's."""
    classes = {"ICudaEngine": Engine, "IExecutionContext": Context}
    for name, cls in classes.items():
        calls = {n for n, f in vars(cls).items() if not n.startswith("_") and (callable(f) or isinstance(f, property))}
        assert calls - {"refuse"} <= tensorrt["names"][name].keys(), name


def test_parameters_of_overloads():
    doc = "f(*args, **kwargs)\nOverloaded function.\n\n1. f(self: T, a: int, b: dict[int, str] = {}) -> int\n\n"
    doc += "2. f(self: T) -> int\n"
    assert parameters(doc) == [["a", "b"], []]
    assert parameters(None) is parameters("f(*args, **kwargs)\n") is None
