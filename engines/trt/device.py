"""This machine's GPU, asked through the CUDA runtime.

Knows: how to ask without a driver being there. Refuses to know: TensorRT. Asking a machine that has a GPU has never run
here.
"""

from __future__ import annotations


def gpu_capability(index: int = 0) -> str | None:
    """Compute capability of GPU `index`, as "8.9"; None without a GPU, a driver or cuda-bindings."""
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        return None
    error, count = cudart.cudaGetDeviceCount()
    if error != cudart.cudaError_t.cudaSuccess or index >= count:
        return None
    digits = []
    for attribute in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"):
        error, value = cudart.cudaDeviceGetAttribute(getattr(cudart.cudaDeviceAttr, attribute), index)
        if error != cudart.cudaError_t.cudaSuccess:
            return None
        digits.append(str(value))
    return ".".join(digits)
