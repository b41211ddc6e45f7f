"""A plan on its way to the disk: written beside its place piece by piece, hashed as it goes, renamed when it is whole.

Knows: files. Refuses to know: what a plan is, the builder that hands the pieces over.
A builder's own copy of a plan is as large as the model; kept in memory it would be there twice more.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


class PlanFile:
    """with PlanFile(path) as file: file.write(...) ...; file.keep(). Without keep() nothing is left, and what lay at
    `path` stays. size: bytes written; sha256: their hash, hex; error: why a piece could not be written."""

    def __init__(self, path: Path):
        self.path, self.size, self.error = path, 0, None
        self._beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._hash, self._whole = hashlib.sha256(), False

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data) -> int:
        """Bytes taken, fewer than came when the disk did not take them (a builder ends then; nothing is raised into
        its callback)."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            return 0
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def keep(self) -> None:
        self._whole = True

    def __enter__(self) -> PlanFile:
        self._file = self._beside.open("wb")
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            try:
                self._file.close()
            except OSError as error:  # its last bytes
                self.error = self.error or error
            if self._whole and self.error is None and kind is None:
                os.replace(self._beside, self.path)
        finally:
            self._beside.unlink(missing_ok=True)
