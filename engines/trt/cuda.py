"""One GPU through the CUDA runtime: memory, one stream, copies, events, and what its errors mean.

Knows: cuda.bindings.runtime, imported where it is needed; who took which memory, so that all of it is given back.
Refuses to know: TensorRT, engines, what the bytes mean. Has never run on a GPU.

After an error other than a lack of memory nothing on the GPU can be trusted, and CUDA answers every further call with
the same error: `failure` then keeps its sentence, and every later call raises it.
"""

from __future__ import annotations

import ctypes
import threading

import numpy as np
from numpy import ndarray

ALIGNMENT = 256  # of every address that TensorRT is given


class DeviceError(RuntimeError):
    """What the GPU or its runtime answered; the message is one sentence."""


class DeviceMemoryError(DeviceError, MemoryError):
    """No room on the GPU; the message says for what and how to need less."""


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Cuda:
    """GPU `device` with a stream of its own. Memory is named for messages. close() gives everything back."""

    def __init__(self, device: int = 0):
        from cuda.bindings import runtime as cudart

        self.cudart, self.device, self.failure = cudart, device, ""
        self._thread = 0
        self._memory: dict[int, int] = {}  # device address -> bytes
        self._pinned: dict[int, int] = {}  # host address -> bytes
        self._events: list = []
        self.stream = None
        self.enter()
        self.stream = self.check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking), "cudaStreamCreate")

    @property
    def nbytes(self) -> int:
        """Device memory taken now."""
        return sum(self._memory.values())

    @property
    def handle(self) -> int:
        """The stream, as TensorRT and other libraries take it."""
        return int(self.stream)

    def name(self) -> str:
        """The GPU's name."""
        properties = self.check(self.cudart.cudaGetDeviceProperties(self.device), "cudaGetDeviceProperties")
        return _text(properties.name)

    def enter(self) -> None:
        """To be called before other calls: the current device is a thread's own. Raises DeviceError after a failure."""
        if self.failure:
            raise DeviceError(f"These engines failed before ({self.failure}); load them again in a new process.")
        if self._thread != (here := threading.get_ident()):
            self.check(self.cudart.cudaSetDevice(self.device), "cudaSetDevice")
            self._thread = here

    def check(self, answer: tuple, what: str):
        """The value of a runtime call's answer (error, *values). Raises DeviceError, one sentence."""
        error, *values = answer
        if error != self.cudart.cudaError_t.cudaSuccess:
            self.failure = f"{what}: {self._words(error)}"
            raise DeviceError(f"The GPU failed in or before {self.failure}.")
        return values[0] if values else None

    def _words(self, error) -> str:
        name = self.cudart.cudaGetErrorName(error)[1]
        return f"{_text(name)}, {_text(self.cudart.cudaGetErrorString(error)[1])}"

    # -- memory --------------------------------------------------------------------------------------------------------

    def allocate(self, size: int, what: str) -> int:
        """Address of `size` bytes on the GPU, for what the message calls `what`. Raises DeviceMemoryError."""
        address = self._allocate(self.cudart.cudaMalloc, size, what, "GPU memory")
        self._memory[address] = size
        return address

    def allocate_pinned(self, size: int, what: str) -> ndarray:
        """[size] uint8 of host memory that the GPU copies from and to on its own. Raises DeviceMemoryError."""
        address = self._allocate(self.cudart.cudaMallocHost, size, what, "pinned host memory")
        self._pinned[address] = size
        return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)

    def _allocate(self, call, size: int, what: str, kind: str) -> int:
        error, *values = call(size)
        if error == self.cudart.cudaError_t.cudaErrorMemoryAllocation:
            self.cudart.cudaGetLastError()  # it is not sticky: clear it
            free, (known, *left) = "", self.cudart.cudaMemGetInfo()
            if call.__name__ == "cudaMalloc" and known == self.cudart.cudaError_t.cudaSuccess:
                free = f" of which {left[0] / 1e6:.0f} MB are free"
            raise DeviceMemoryError(
                f"{what} takes {size / 1e6:.1f} MB of {kind}{free}; end what else uses the GPU, or export again with "
                f"fewer --max-requests, a smaller --chunk or --max-context."
            )
        return int(self.check((error, *values), call.__name__))

    def free(self, address: int) -> None:
        """Device memory; the stream must have no work left on it (synchronize)."""
        del self._memory[address]
        self.check(self.cudart.cudaFree(address), "cudaFree")

    def free_pinned(self, array: ndarray) -> None:
        address = array.ctypes.data
        del self._pinned[address]
        self.check(self.cudart.cudaFreeHost(address), "cudaFreeHost")

    def settle(self) -> None:
        """Waits for all work. Never raises."""
        if self.stream is not None:
            self.cudart.cudaSetDevice(self.device)
            self.cudart.cudaStreamSynchronize(self.stream)

    def close(self) -> None:
        """Gives back everything. Never raises: after a failure the calls fail too, and the driver has taken it all."""
        cudart = self.cudart
        if self.stream is None:
            return
        self.settle()
        for event in self._events:
            cudart.cudaEventDestroy(event)
        for address in self._memory:
            cudart.cudaFree(address)
        for address in self._pinned:
            cudart.cudaFreeHost(address)
        cudart.cudaStreamDestroy(self.stream)
        self._events, self._memory, self._pinned, self.stream = [], {}, {}, None

    # -- work on the stream --------------------------------------------------------------------------------------------

    def upload(self, address: int, array: ndarray, size: int) -> None:
        """The first `size` bytes of a pinned array to the GPU; it must not change until the copy is over."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, array.ctypes.data, size, kind)

    def download(self, array: ndarray, address: int, size: int) -> None:
        """`size` bytes of the GPU into the start of a pinned array; there once the stream has come so far."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, address, size, kind)

    def copy(self, destination: int, source: int, size: int) -> None:
        """Within the GPU."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy(destination, source, size, kind)

    def _copy(self, destination: int, source: int, size: int, kind) -> None:
        cudart = self.cudart
        self.check(cudart.cudaMemcpyAsync(destination, source, size, kind, self.stream), "cudaMemcpyAsync")

    def copy_rows(self, destination: int, source: int, width: int, pitch: int, rows: int) -> None:
        """`rows` stretches of `width` bytes, `pitch` bytes apart in both places, within the GPU."""
        cudart, kind = self.cudart, self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        answer = cudart.cudaMemcpy2DAsync(destination, pitch, source, pitch, width, rows, kind, self.stream)
        self.check(answer, "cudaMemcpy2DAsync")

    def zero(self, address: int, size: int) -> None:
        self.check(self.cudart.cudaMemsetAsync(address, 0, size, self.stream), "cudaMemsetAsync")

    def event(self):
        """A new event; it counts as reached until it is recorded."""
        made = self.check(self.cudart.cudaEventCreateWithFlags(self.cudart.cudaEventDisableTiming), "cudaEventCreate")
        self._events.append(made)
        return made

    def record(self, event) -> None:
        self.check(self.cudart.cudaEventRecord(event, self.stream), "cudaEventRecord")

    def wait(self, event, what: str) -> None:
        """The host waits for the event. Raises DeviceError for whatever failed on the way, calling it `what`."""
        self.check(self.cudart.cudaEventSynchronize(event), what)

    def synchronize(self, what: str = "cudaStreamSynchronize") -> None:
        self.check(self.cudart.cudaStreamSynchronize(self.stream), what)

    def follow(self, stream: int) -> None:
        """Our stream waits for what another one holds by now."""
        if stream == self.handle:
            return
        event = self.event()
        self.check(self.cudart.cudaEventRecord(event, stream), "cudaEventRecord")
        self.check(self.cudart.cudaStreamWaitEvent(self.stream, event, 0), "cudaStreamWaitEvent")
        self._events.remove(event)
        self.check(self.cudart.cudaEventDestroy(event), "cudaEventDestroy")  # CUDA keeps it until it is reached

    # -- CUDA graphs ---------------------------------------------------------------------------------------------------

    def capture(self, enqueue):
        """What `enqueue()` puts on the stream, as a graph that can be launched again; nothing of it runs now. None
        where the work cannot be captured (enqueue() is False, or CUDA says so)."""
        cudart, done = self.cudart, self.cudart.cudaError_t.cudaSuccess
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.check(cudart.cudaStreamBeginCapture(self.stream, mode), "cudaStreamBeginCapture")
        try:
            fine = enqueue()
        finally:
            error, graph = cudart.cudaStreamEndCapture(self.stream)
        made = None
        if error == done:
            if fine:
                error, made = cudart.cudaGraphInstantiate(graph, 0)
            cudart.cudaGraphDestroy(graph)
        if error != done:
            cudart.cudaGetLastError()
            return None
        return made

    def launch(self, graph) -> None:
        self.check(self.cudart.cudaGraphLaunch(graph, self.stream), "cudaGraphLaunch")

    def drop(self, graph) -> None:
        """Never raises: a graph is dropped on the way out of failures too."""
        self.cudart.cudaGraphExecDestroy(graph)


def _text(value) -> str:
    return value.decode(errors="replace").rstrip("\0") if isinstance(value, bytes) else str(value)
