"""How much memory this process took at most while something ran.

Knows: /proc. Refuses to know: what ran.
"""

from __future__ import annotations

import resource
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # "sets the peak resident set size to the current one"


def status_bytes(key: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file or field."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    value = next((line.split()[1] for line in lines if line.startswith(f"{key}:")), None)
    return None if value is None else int(value) * 1024


class PeakMemory:
    """with PeakMemory() as memory: ...; memory.peak is then the most bytes that were resident beyond those at the
    start."""

    peak = 0

    def __enter__(self) -> PeakMemory:
        try:
            RESET.write_text(_RESET_PEAK)
        except OSError:  # the peak is then that of the process's life
            pass
        self.start = status_bytes("VmRSS") or 0
        return self

    def __exit__(self, *_) -> None:
        most = status_bytes("VmHWM")
        if most is None:
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.peak = max(most - self.start, 0)
