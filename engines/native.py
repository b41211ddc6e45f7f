"""The bundle's own CPU operators (engines/kernels, compiled at export), made known to ONNX Runtime.

Knows: the manifest's `kernels`, and that the library is the file that the manifest names. Refuses to know: what an operator does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from .manifest import REMAKE, BundleError, get


@dataclass(frozen=True)
class KernelsSpec:
    """The library's file, relative to the bundle, its sha256, and the engines whose attention is one of its operators (an older
    bundle does not say)."""

    path: str
    sha256: str
    attention: tuple[str, ...] = ()

    @classmethod
    def of(cls, raw: dict[str, Any], where: str) -> KernelsSpec:
        """Raises BundleError, one sentence."""
        attention = get(raw, "attention", list, where) if "attention" in raw else []
        if odd := next((name for name in attention if not isinstance(name, str)), None):
            raise BundleError(f"{where}: attention holds {odd!r}, it must hold names of engines; {REMAKE}.")
        return cls(get(raw, "path", str, where), get(raw, "sha256", str, where), tuple(attention))


def register(options: ort.SessionOptions, library: Path) -> None:
    """Raises BundleError, one sentence, when the library does not load or this CPU cannot run it."""
    try:
        options.register_custom_ops_library(str(library.resolve()))
    except Exception as error:  # ONNX Runtime raises its own unrelated types
        raise BundleError(f"{library}: {str(error).splitlines()[0]}; {REMAKE}.") from error
