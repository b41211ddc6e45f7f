"""Hashes of a bundle's files, remembered from one start to the next.

Knows: sha256 and where it keeps what it knows. Refuses to know: which hash a file should have.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path


class HashCache:
    """sha256 of files, remembered by (path, size, mtime) in the user's temporary folder; losing it costs a second."""

    def __init__(self) -> None:
        user = os.getuid() if hasattr(os, "getuid") else "user"
        self.file = Path(tempfile.gettempdir()) / f"dspark-hashes-{user}.json"
        self.changed = False
        try:
            known = json.loads(self.file.read_text()) if self.file.stat().st_uid == user else {}
            self.known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            self.known = {}

    def sha256(self, file: Path) -> str:
        """Hex; read again only when the file's size or time of change is another."""
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in self.known:
            with file.open("rb") as handle:
                self.known[key] = hashlib.file_digest(handle, "sha256").hexdigest()
            self.changed = True
        return self.known[key]

    def save(self) -> None:
        """Writes what is new, the newest 500 at most."""
        if not self.changed:
            return
        temporary = self.file.with_suffix(f".{os.getpid()}")
        try:
            temporary.write_text(json.dumps(dict(list(self.known.items())[-500:])))
            temporary.replace(self.file)
        except OSError:  # a cache only
            pass
