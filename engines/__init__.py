"""Compiled engines: load a bundle, run its five graphs, own their caches."""

from __future__ import annotations

from pathlib import Path

from .base import Engines
from .bundle import Bundle, BundleError

__all__ = ["Bundle", "BundleError", "Engines", "load"]


def load(bundle_folder: str | Path, *, backend: str | None = None, threads: int | None = None) -> Engines:
    """Opens a bundle. `backend`: None = the manifest's. Raises BundleError, in one sentence, for what does not fit."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it must be 1 or more.")
    bundle = Bundle.load(bundle_folder)
    if backend not in (None, bundle.backend):
        raise BundleError(
            f"{bundle_folder}: backend is {bundle.backend!r}, not {backend!r}; "
            f"run python -m export --backend {backend}."
        )
    if bundle.backend != "onnxruntime":
        from .trt.plans import check_bundle

        check_bundle(bundle)
        raise BundleError(
            f"{bundle_folder}: this version compiles {bundle.backend} plans and does not run them yet; "
            f"run python -m export --backend onnxruntime."
        )
    from .onnxruntime import OnnxRuntimeEngines

    return OnnxRuntimeEngines(bundle, threads=threads)
