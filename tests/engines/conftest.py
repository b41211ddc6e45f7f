from contextlib import contextmanager
from pathlib import Path

import pytest

import engines
from engines.bundle import Bundle
from engines.devices import Device
from engines.onnxruntime_cuda import DeviceEngines
from tests.bundles import tiny_bundle
from tests.engines.trt.double.machine import double_bundle, machine

KINDS = ["onnxruntime", "device", "tensorrt"]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="session")
def double(bundle):
    """The same two checkpoints in TensorRT's form, with plans for the double."""
    return double_bundle(bundle.parent, bundle.parent / "double")


@contextmanager
def opened(kind: str, bundle: Path, double: Path):
    if kind == "onnxruntime":
        yield engines.load(bundle, threads=1)
        return
    if kind == "device":
        yield DeviceEngines(Bundle.load(bundle), Device("cpu"), threads=1)
        return
    with machine():
        runner = engines.load(double)
        yield runner
        runner.close()


@pytest.fixture(scope="module")
def loaded(bundle):
    return engines.load(bundle, threads=1)


@pytest.fixture(scope="module", params=KINDS)
def either(request, bundle, double):
    """Engines of the same models: ONNX Runtime's, its engines of a device on the CPU, and TensorRT's runner on the double
    of a GPU."""
    with opened(request.param, bundle, double) as found:
        yield found


@pytest.fixture(params=KINDS)
def fresh(request, bundle, double):
    """The same, of one test alone."""
    with opened(request.param, bundle, double) as found:
        yield found
