"""The machine behind the double: memory at addresses that are nobody's, streams that do nothing until somebody waits.

Stricter than a GPU: what a real one would answer with other numbers, a crash or silence is a `problem` here, and
raised. Work that is queued runs when the host waits for it, never before: whoever reads too early reads what was there.
"""

from __future__ import annotations

import bisect
import ctypes
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

BASE, GAP = 0x6D00_0000_0000, 1 << 16  # no process maps memory there
POISON = 0xFF  # NaN in every float type, -1 as an integer
DEVICE, PINNED = "device", "pinned"


class DoubleError(Exception):
    """Undefined behaviour on a real GPU."""


@dataclass
class Allocation:
    start: int
    data: np.ndarray
    kind: str
    freed: bool = False

    @property
    def end(self) -> int:
        return self.start + self.data.nbytes


@dataclass
class Work:
    """What a stream does: `check` sees that its memory is still there; `run` does it."""

    what: str
    check: Callable[[], None]
    run: Callable[[], None]
    context: object = None
    version: int = 0


@dataclass(eq=False)
class Stream:
    handle: int
    queue: deque[Work] = field(default_factory=deque)
    recording: list[Work] | None = None

    def __int__(self) -> int:
        return self.handle


@dataclass(eq=False)
class Event:
    handle: int
    stream: Stream | None = None
    reached: bool = True

    def __int__(self) -> int:
        return self.handle


@dataclass(eq=False)
class Recorded:
    """A CUDA graph."""

    work: list[Work]


class Gpu:
    """capacity: bytes of device memory. calls: how often each runtime function was called. downloaded, uploaded: bytes
    by tensor name ("?" = unknown)."""

    def __init__(self, capability: str = "8.9", capacity: int = 1 << 32):
        self.capability, self.capacity = capability, capacity
        self.allocations: dict[int, Allocation] = {}
        self.starts: list[int] = []
        self.next = BASE
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Event] = {}
        self.graphs: set[Recorded] = set()
        self.living: set[int] = set()  # TensorRT objects
        self.problems: list[str] = []
        self.calls: Counter[str] = Counter()
        self.downloaded: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()  # executions by engine, run
        self.tensors: dict[int, tuple[str, int]] = {}  # address -> (tensor name, bytes) of the last execution
        self.sticky = None  # the error that every call answers from now on
        self.failing: dict[str, tuple[int, object]] = {}  # function -> (calls until it fails, error)
        self._handles = 0x51

    # -- failures ------------------------------------------------------------------------------------------------------

    def fail(self, function: str, at: int = 1, error: object = None) -> None:
        """The at-th call of a function from now on answers `error`. "execution": the at-th that runs on the device."""
        self.failing[function] = (at, error)

    def due(self, function: str):
        """The error that this call of a function must answer, or None."""
        if function not in self.failing:
            return None
        left, error = self.failing[function]
        self.failing[function] = (left - 1, error)
        if left > 1:
            return None
        del self.failing[function]
        return error or True

    def complain(self, problem: str) -> None:
        self.problems.append(problem)
        raise DoubleError(problem)

    # -- memory --------------------------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        return sum(a.data.nbytes for a in self.allocations.values() if a.kind == DEVICE and not a.freed)

    def take(self, size: int, kind: str) -> int:
        data = np.full(size + 256, POISON, np.uint8)
        data = data[-data.ctypes.data % 256 :][:size]  # kernels may rely on it
        start = data.ctypes.data if kind == PINNED else self.next
        if kind == DEVICE:
            self.next = start + -(-size // 256) * 256 + GAP
        old = self.allocations.get(start)
        self.allocations[start] = Allocation(start, data, kind)
        if old is None:
            bisect.insort(self.starts, start)
        return start

    def release(self, start: int, kind: str) -> None:
        found = self.allocations.get(start)
        if found is None or found.freed or found.kind != kind:
            self.complain(f"{start:#x} is freed as {kind} memory, which it is not")
        if any(stream.queue for stream in self.streams.values()):
            self.complain(f"memory {start:#x} is freed while work is queued")
        found.freed = True

    def find(self, address: int, size: int, what: str, kind: str | None = DEVICE) -> Allocation:
        """The living allocation that holds all of it."""
        at = bisect.bisect_right(self.starts, address) - 1
        found = self.allocations[self.starts[at]] if at >= 0 else None
        if found is None or address >= max(found.end, found.start + 1):
            self.complain(f"{what}: {address:#x} is nobody's memory")
        if found.freed:
            self.complain(f"{what}: {address:#x} was freed")
        if address + size > found.end:
            self.complain(f"{what}: {size} bytes at {address:#x} end {address + size - found.end} bytes too late")
        if kind is not None and found.kind != kind:
            self.complain(f"{what}: {address:#x} is {found.kind} memory, not {kind}")
        return found

    def bytes(self, address: int, size: int, what: str, kind: str | None = DEVICE) -> np.ndarray:
        found = self.find(address, size, what, kind)
        return found.data[address - found.start :][:size]

    def name_of(self, address: int) -> str:
        for start, (name, size) in self.tensors.items():
            if start <= address < start + max(size, 1):
                return name
        return "?"

    def leaks(self) -> list[str]:
        """What was taken and not given back."""
        left = [f"{a.kind} memory of {a.data.nbytes} bytes" for a in self.allocations.values() if not a.freed]
        left += [f"stream {s}" for s in self.streams] + [f"event {e}" for e in self.events]
        return left + ["a CUDA graph"] * len(self.graphs) + ["a TensorRT object"] * len(self.living)

    # -- streams -------------------------------------------------------------------------------------------------------

    def handle(self) -> int:
        self._handles += 16
        return self._handles

    def put(self, stream: Stream, work: Work) -> None:
        work.check()
        (stream.queue if stream.recording is None else stream.recording).append(work)

    def drain(self, stream: Stream, until: Callable[[], bool] = lambda: False) -> None:
        """Runs a stream's work, up to a point."""
        while stream.queue and not until() and self.sticky is None:
            work = stream.queue.popleft()
            work.check()
            work.run()
        if self.sticky is not None:
            for each in self.streams.values():
                each.queue.clear()

    def stream(self, handle: object, what: str) -> Stream:
        found = self.streams.get(int(handle))
        if found is None:
            self.complain(f"{what}: there is no stream {int(handle)}")
        return found


def read_host(address: int, dtype: np.dtype, count: int) -> np.ndarray:
    """A copy of host memory."""
    return np.frombuffer(ctypes.string_at(address, dtype.itemsize * count), dtype).copy()
