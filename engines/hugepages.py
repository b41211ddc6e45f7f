"""Huge pages for the memory that weights are streamed from.

Knows: Linux' madvise. Refuses to know: engines, weights. A pass over a small model reads every weight once, and with
pages of 4 KiB the address translation is a good part of it. Most distributions give huge pages only to memory that asks
for them (/sys/kernel/mm/transparent_hugepage/enabled: madvise), and ONNX Runtime does not ask.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

SIZE = 2 << 20  # of a huge page (x86-64, and AArch64 with 4 KiB pages)
MMAP_THRESHOLD = -3  # M_* of mallopt
HUGEPAGE, COLLAPSE = 14, 25  # MADV_*: from now on; at once (Linux 6.1)
MAPS, SETTING = Path("/proc/self/maps"), Path("/sys/kernel/mm/transparent_hugepage/enabled")


def gather() -> bool:
    """Lets malloc take blocks of up to 32 MiB from the heap, side by side, instead of a mapping for each: the packed weights
    of a layer are 1 to 4 MiB, and a huge page fits into few of such mappings. False where there is no glibc."""
    try:
        return ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 32 << 20) == 1
    except AttributeError:
        return False


def places() -> set[int]:
    """Addresses in this process where a huge page could lie; none where the system has none or its setting is
    `never`."""
    try:
        allowed = sys.platform == "linux" and "[never]" not in SETTING.read_text()
        return places_in(MAPS.read_text()) if allowed else set()
    except OSError:
        return set()


def places_in(maps: str) -> set[int]:
    """The same for a /proc/<pid>/maps text: multiples of SIZE wholly inside a private, writable, anonymous mapping
    (heap and nameless; never a stack or a file)."""
    found: set[int] = set()
    for line in maps.splitlines():
        addresses, access, _, _, inode, *name = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and (not name or name[0].strip() == "[heap]"):
            start, end = (int(x, 16) for x in addresses.split("-"))
            found |= set(range(-(-start // SIZE) * SIZE, end // SIZE * SIZE, SIZE))
    return found


def ask(addresses: set[int]) -> int:
    """Asks for a huge page at each address (of `places`), without changing what is there; returns how many were
    accepted."""
    if not addresses:
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    accepted = [a for a in sorted(addresses) if madvise(a, SIZE, HUGEPAGE) == 0]
    for address in accepted:
        madvise(address, SIZE, COLLAPSE)  # refused by older kernels, whose own thread does it in time
    return len(accepted)
