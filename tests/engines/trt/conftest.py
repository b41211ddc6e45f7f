import pytest

import engines
from tests.bundles import tiny_bundle
from tests.engines.trt.double.machine import double_bundle, machine


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with target/, draft/ and bundle/ (ONNX Runtime's): draft vocabulary 40, token 20 ends a sequence."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_bundle(folder, draft_vocab=40, eos=20)
    return folder


@pytest.fixture(scope="session")
def planned(checkpoints):
    """The bundle for the double."""
    return double_bundle(checkpoints, checkpoints / "double")


@pytest.fixture(scope="session")
def plain(checkpoints):
    """ONNX Runtime's engines of the same models."""
    return engines.load(checkpoints / "bundle", threads=1)


@pytest.fixture
def gpu():
    with machine() as double:
        yield double


@pytest.fixture
def opened(gpu, planned):
    """TensorRT's runner on `gpu`."""
    runner = engines.load(planned)
    yield runner
    runner.close()
