"""Names of devices: "cpu", "cuda" (GPU 0), "cuda:N".

Knows: how a device is written. Refuses to know: whether it is there, what runs on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """kind: "cpu" | "cuda"; index: of the GPU, as CUDA counts them in this process (0 for the CPU)."""

    kind: str = "cpu"
    index: int = 0

    @classmethod
    def of(cls, text: str) -> "Device":
        """Raises ValueError, one sentence, for what is no device."""
        found = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
        if not found:
            raise ValueError(f"device is {text!r}; it must be cpu, cuda or cuda:N.")
        return cls(text.split(":")[0], int(found[1] or 0))

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"
