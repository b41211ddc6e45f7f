import pytest

import engines
from engines.devices import Device


def test_devices_by_name():
    assert [Device.of(t) for t in ("cpu", "cuda", "cuda:3")] == [Device(), Device("cuda", 0), Device("cuda", 3)]
    assert [str(Device.of(t)) for t in ("cpu", "cuda")] == ["cpu", "cuda:0"]


@pytest.mark.parametrize("text", ["gpu", "cpu:0", "cuda:x", "cuda:0,1", ""])
def test_what_is_no_device(text, bundle):
    with pytest.raises(ValueError, match=f"^device is '{text}'; it must be cpu, cuda or cuda:N.$"):
        engines.load(bundle, device=text)


def test_the_cpu_by_name(bundle):
    loaded = engines.load(bundle, threads=1, device="cpu")
    assert loaded.provider == "CPUExecutionProvider"
    loaded.close()


def test_plans_run_on_a_gpu_alone(double):
    with pytest.raises(engines.BundleError, match="device is 'cpu'; tensorrt plans run on a GPU .cuda or cuda:N."):
        engines.load(double, device="cpu")
