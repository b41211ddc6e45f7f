"""Compiled engines: load a bundle, run its five graphs, own their caches."""

from __future__ import annotations

from pathlib import Path

from .base import Engines
from .bundle import Bundle, BundleError
from .devices import Device

__all__ = ["Bundle", "BundleError", "Engines", "load"]


def load(
    bundle_folder: str | Path, *, backend: str | None = None, threads: int | None = None, device: str | None = None
) -> Engines:
    """Opens a bundle. `backend`: None = the manifest's; `device`: "cpu" | "cuda" | "cuda:N", None = the backend's own
    (the CPU for onnxruntime, GPU 0 for TensorRT). Raises BundleError, in one sentence, for what does not fit,
    ValueError for what is no device."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it must be 1 or more.")
    place = None if device is None else Device.of(device)
    bundle = Bundle.load(bundle_folder)
    if backend not in (None, bundle.backend):
        raise BundleError(
            f"{bundle_folder}: backend is {bundle.backend!r}, not {backend!r}; "
            f"run python -m export --backend {backend}."
        )
    if bundle.backend != "onnxruntime":
        if place is not None and place.kind == "cpu":
            raise BundleError(f"{bundle_folder}: device is 'cpu'; {bundle.backend} plans run on a GPU (cuda or cuda:N).")
        from .tensorrt import TensorRtEngines

        return TensorRtEngines(bundle, device=place.index if place else 0)
    if place is not None and place.kind == "cuda":
        if bundle.kernels:
            raise BundleError(
                f"{bundle_folder}: device is {device!r}; its kernels run on the CPU only, "
                f"export with --dtype fp32 --kernels onnxruntime."
            )
        from .onnxruntime_cuda import DeviceEngines

        return DeviceEngines(bundle, place, threads=threads)
    from .onnxruntime import OnnxRuntimeEngines

    return OnnxRuntimeEngines(bundle, threads=threads)
