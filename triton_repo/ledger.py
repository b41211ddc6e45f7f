"""What the processes of one server tell each other through shared memory: how far postprocessing is with a request, and
what the instances of dspark (one a GPU) must know of each other.

Knows: counts and flags by request and by instance. Refuses to know: what a round holds, Triton.

Why: nothing in Triton slows a decoupled model down when the next step of the ensemble is slower. Without the counts,
rounds pile up in front of postprocessing, and with them the time until a cancelled request is noticed. And Triton gives
a control call (stop, drain) to any one instance of a model. All are processes of one server, so the file is named after
their parent.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SLOTS = 8192  # requests in flight of an instance that are told apart
INSTANCES = 64  # of dspark in one server; the lowest bits of a uid say which
WORD = struct.Struct("=Q")
LIFE, CLAIMED, DRAINING, HEADER = 0, 1, 2, 3  # words: the server's start, a bit an instance, a flag
COUNTS = HEADER  # [INSTANCES, 2] words: requests active, waiting
ROUNDS = COUNTS + 2 * INSTANCES  # [INSTANCES, SLOTS] words
STOPS = (ROUNDS + INSTANCES * SLOTS) * WORD.size  # [INSTANCES, SLOTS] bytes
SIZE = STOPS + INSTANCES * SLOTS  # a page that nobody writes takes no memory


def ledger_file(server_pid: int) -> Path:
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    return folder / f"dspark_ledger_{server_pid}"


def life_of(pid: int) -> int:
    """When process `pid` was started, in clock ticks since boot: tells two with the same id apart. 0: not known."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


class Ledger:
    """dspark's instances make the file (make=True: the first makes it, each claims an `instance` number), and
    postprocessing opens it; all keep it mapped. life: of the server; the content of another server's life is wiped.

    Raises FileNotFoundError (make=False), PermissionError for another user's file, RuntimeError past INSTANCES."""

    def __init__(self, file: Path, *, make: bool, life: int = 0):
        self._file, self.instance = file, None
        flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
        self._handle = os.open(file, flags, 0o600)
        try:
            if os.fstat(self._handle).st_uid != os.geteuid():
                raise PermissionError(f"{file} belongs to another user.")
            with self._locked():
                size = os.fstat(self._handle).st_size
                if make and (size != SIZE or WORD.unpack(os.pread(self._handle, WORD.size, 0))[0] != life):
                    os.ftruncate(self._handle, 0)
                    os.ftruncate(self._handle, SIZE)
                    os.pwrite(self._handle, WORD.pack(life), 0)
                self._memory = mmap.mmap(self._handle, SIZE)
                if make:
                    self.instance = self._claim()
        except BaseException:
            os.close(self._handle)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_UN)

    def _claim(self) -> int:
        claimed = self._word(CLAIMED)
        instance = next((i for i in range(INSTANCES) if not claimed >> i & 1), None)
        if instance is None:
            raise RuntimeError(f"A server has at most {INSTANCES} instances of dspark.")
        self._set(CLAIMED, claimed | 1 << instance)
        self._set(DRAINING, 0)
        return instance

    def _word(self, index: int) -> int:
        return WORD.unpack_from(self._memory, index * WORD.size)[0]

    def _set(self, index: int, value: int) -> None:
        WORD.pack_into(self._memory, index * WORD.size, value)

    @staticmethod
    def _place(uid: int) -> int:
        return uid % INSTANCES * SLOTS + uid // INSTANCES % SLOTS

    # How far postprocessing is.

    def begin(self, uid: int) -> None:
        """Request `uid` is new: nothing of it is handled, nobody wants it stopped."""
        self.write(uid, 0)
        self._memory[STOPS + self._place(uid)] = 0

    def write(self, uid: int, rounds: int) -> None:
        """Rounds of request `uid` that are handled."""
        self._set(ROUNDS + self._place(uid), rounds)

    def read(self, uid: int) -> int:
        return self._word(ROUNDS + self._place(uid))

    # What dspark's instances know of each other.

    def owns(self, uid: int) -> bool:
        """Request `uid` is decoded by this instance."""
        return uid % INSTANCES == self.instance

    def stop(self, uid: int) -> None:
        """Asks the instance that decodes `uid` to cancel it."""
        self._memory[STOPS + self._place(uid)] = 1

    def stopped(self, uid: int) -> bool:
        return self._memory[STOPS + self._place(uid)] != 0

    @property
    def draining(self) -> bool:
        """No instance takes new requests."""
        return self._word(DRAINING) != 0

    def drain(self, on: bool) -> None:
        self._set(DRAINING, on)

    def tell(self, active: int, waiting: int) -> None:
        """What this instance has to do now."""
        self._set(COUNTS + 2 * self.instance, active)
        self._set(COUNTS + 2 * self.instance + 1, waiting)

    def counts(self) -> tuple[int, int]:
        """(active, waiting) of all instances together."""
        words = [self._word(COUNTS + i) for i in range(2 * INSTANCES)]
        return sum(words[::2]), sum(words[1::2])

    def close(self) -> None:
        """The last of dspark's instances removes the file."""
        if self.instance is not None:
            self.tell(0, 0)
            with self._locked():
                self._set(CLAIMED, left := self._word(CLAIMED) & ~(1 << self.instance))
                if not left:
                    self._file.unlink(missing_ok=True)
        self._memory.close()
        os.close(self._handle)
