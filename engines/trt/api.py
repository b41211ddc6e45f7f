"""The two TensorRT packages behind one description: where they differ, and nothing else.

Knows: how each is imported, what a plan is aimed at, that TensorRT-RTX ignores timing caches. Refuses to know: graphs,
files. TensorRT compiles for the GPU of this machine; TensorRT-RTX for any GPU it knows, without one. TensorRT itself
has never run here: its calls are checked against its bindings only (tests/engines/trt/test_surface.py).
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType

from ..manifest import BundleError
from .device import gpu_capability

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PACKAGES = {"tensorrt": "tensorrt-cu13", "tensorrt-rtx": "tensorrt-rtx-cu13"}
FALLBACK_CAPABILITY = "8.9"  # what TensorRT-RTX compiles for on a machine without a GPU


class BuildError(ValueError):
    """A graph that a TensorRT builder does not take; the message is one sentence with the builder's own words."""


@dataclass(frozen=True)
class Api:
    """backend: "tensorrt" | "tensorrt-rtx"; trt: its Python module; version as the module states it."""

    backend: str
    trt: ModuleType
    version: str

    @property
    def crosses(self) -> bool:
        """Whether it compiles for GPUs that are not here."""
        return self.backend == "tensorrt-rtx"

    @property
    def keeps_timings(self) -> bool:
        """Whether a timing cache has any effect."""
        return self.backend == "tensorrt"

    @property
    def records(self) -> bool:
        """Whether launches are for us to record as CUDA graphs; TensorRT-RTX does it by itself (new_context)."""
        return self.backend == "tensorrt"

    def capabilities(self) -> tuple[str, ...]:
        """The GPUs that it can be told to compile for, as "8.9"; empty where it takes this machine's."""
        if not self.crosses:
            return ()
        numbers = [name[2:] for name in self.trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
        return tuple(f"{n[:-1]}.{n[-1]}" for n in sorted(numbers, key=int))


def load_api(backend: str) -> Api:
    """Raises BundleError, one sentence, where the package or its library is not there."""
    try:
        trt = importlib.import_module(MODULES[backend])
        return Api(backend, trt, trt.__version__)
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        other = ", or use --backend tensorrt-rtx" if backend == "tensorrt" else ""
        how = f"install it with pip install {PACKAGES[backend]}{other}"
        raise BundleError(f"{backend} does not load ({reason}); {how}.") from None


def default_backend() -> str:
    """TensorRT where it and its libnvinfer load, else TensorRT-RTX."""
    try:
        load_api("tensorrt")
    except BundleError:
        return "tensorrt-rtx"
    return "tensorrt"


def chosen_capabilities(api: Api, wanted: list[str]) -> list[str]:
    """What to compile for: `wanted` ("8.9", ...), or this machine's GPU, or (TensorRT-RTX without a GPU) 8.9.

    Raises BuildError, one sentence, for what the builder cannot compile for."""
    here, known = gpu_capability(), api.capabilities()
    for capability in wanted:
        if not re.fullmatch(r"\d+\.\d", capability):
            raise BuildError(
                f"--compute-capability is {capability!r}; it must look like 8.9, several of them with commas."
            )
    if api.crosses:
        chosen = list(dict.fromkeys(wanted)) or [here or FALLBACK_CAPABILITY]
        if unknown := [c for c in chosen if c not in known]:
            raise BuildError(
                f"{api.backend} {api.version} does not compile for compute capability {unknown[0]}, "
                f"it knows {', '.join(known)}; use --backend tensorrt on a machine with such a GPU."
            )
        return chosen
    if here is None:
        raise BuildError(
            f"{api.backend} compiles for the GPU of this machine, and there is none; use --backend tensorrt-rtx."
        )
    if other := [c for c in wanted if c != here]:
        raise BuildError(
            f"{api.backend} compiles for the GPU of this machine ({here}), not for {other[0]}; "
            f"leave --compute-capability out or use --backend tensorrt-rtx."
        )
    return [here]


def new_context(api: Api, engine):
    """An execution context whose working memory is ours to give; None where the library refuses."""
    trt = api.trt
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not api.crosses:
        return engine.create_execution_context(strategy)
    settings = engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(strategy)
    settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(settings)


def aim(api: Api, config, capability: str) -> None:
    """Tells the builder's config which GPU to compile for. Raises BuildError when it does not take it."""
    if not api.crosses:
        return
    trt = api.trt
    target = trt.ComputeCapability.__members__.get("SM" + capability.replace(".", ""))
    config.num_compute_capabilities = 1
    if target is None or not config.set_compute_capability(target, 0):  # answers False, does not raise
        raise BuildError(
            f"{api.backend} {api.version} refused compute capability {capability}; "
            f"it knows {', '.join(api.capabilities())}."
        )
