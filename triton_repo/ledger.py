"""How far postprocessing is, told to dspark through a few kilobytes of shared memory.

Knows: a count per request. Refuses to know: what a round holds, Triton.

Why: nothing in Triton slows a decoupled model down when the next step of the ensemble is slower. Without this, rounds
pile up in front of postprocessing, and with them the time until a cancelled request is noticed. Both models are
processes of one server, so the file is named after their parent.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from pathlib import Path

SLOTS = 8192  # requests in flight that are told apart
WORD = struct.Struct("=Q")


def ledger_file(server_pid: int) -> Path:
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    return folder / f"dspark_ledger_{server_pid}"


class Ledger:
    """Counts of handled rounds by uid. dspark makes the file, postprocessing opens it; both keep it mapped."""

    def __init__(self, file: Path, *, make: bool):
        self._file = file if make else None
        if make:
            file.unlink(missing_ok=True)  # of a server that had the same process id
        flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if make else 0)
        handle = os.open(file, flags, 0o600)
        try:
            if make:
                os.ftruncate(handle, SLOTS * WORD.size)
            self._memory = mmap.mmap(handle, SLOTS * WORD.size)
        finally:
            os.close(handle)

    def write(self, uid: int, rounds: int) -> None:
        """Rounds of request `uid` that are handled."""
        WORD.pack_into(self._memory, uid % SLOTS * WORD.size, rounds)

    def read(self, uid: int) -> int:
        return WORD.unpack_from(self._memory, uid % SLOTS * WORD.size)[0]

    def close(self) -> None:
        self._memory.close()
        if self._file is not None:
            self._file.unlink(missing_ok=True)
