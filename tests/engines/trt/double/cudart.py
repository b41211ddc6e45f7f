"""cuda.bindings.runtime on a Gpu: the functions that the runner calls, with their names, arguments and answers."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

from cuda.bindings import runtime as real

from .gpu import DEVICE, PINNED, Event, Gpu, Recorded, Stream, Work

OK = real.cudaError_t.cudaSuccess
ILLEGAL = real.cudaError_t.cudaErrorIllegalAddress
NO_MEMORY = real.cudaError_t.cudaErrorMemoryAllocation
ALWAYS = ("cudaGetErrorName", "cudaGetErrorString", "cudaGetLastError")  # answer after a failure too
WAITING = ("cudaStreamSynchronize", "cudaEventSynchronize")
FORBIDDEN = ("cudaMalloc", "cudaMallocHost", "cudaFree", "cudaFreeHost", *WAITING)  # while a stream records
KINDS = {
    real.cudaMemcpyKind.cudaMemcpyHostToDevice: (DEVICE, PINNED),
    real.cudaMemcpyKind.cudaMemcpyDeviceToHost: (PINNED, DEVICE),
    real.cudaMemcpyKind.cudaMemcpyDeviceToDevice: (DEVICE, DEVICE),
}


def function(method):
    """A runtime function: counted, failing when it was told to, and as forbidden while a stream records as in CUDA."""

    def call(self, *args):
        gpu, name = self.gpu, method.__name__
        gpu.calls[name] += 1
        if name in ALWAYS:
            return method(self, *args)
        if gpu.sticky is not None:
            return gpu.sticky, None
        if (error := gpu.due(name)) is not None:
            if name == "cudaStreamEndCapture":
                args[0].recording = None  # it ends all the same
            return error, None
        if name in FORBIDDEN and any(s.recording is not None for s in gpu.streams.values()):
            gpu.complain(f"{name} is called while a stream records")
        result = method(self, *args)
        return (gpu.sticky, None) if gpu.sticky is not None else result

    call.__name__, call.arguments = method.__name__, method.__code__.co_argcount - 1
    return call


class Cudart:
    cudaError_t, cudaMemcpyKind, cudaDeviceAttr = real.cudaError_t, real.cudaMemcpyKind, real.cudaDeviceAttr
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaEventDisableTiming = real.cudaStreamNonBlocking, real.cudaEventDisableTiming

    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    # -- the device ----------------------------------------------------------------------------------------------------

    @function
    def cudaGetDeviceCount(self):
        return OK, 1

    @function
    def cudaDeviceGetAttribute(self, attribute, device):
        major, minor = self.gpu.capability.split(".")
        return OK, int(major if attribute.name.endswith("Major") else minor)

    @function
    def cudaGetDeviceProperties(self, device):
        return OK, SimpleNamespace(name=b"Double\0")

    @function
    def cudaSetDevice(self, device):
        return (OK,)

    @function
    def cudaGetErrorName(self, error):
        return OK, error.name.encode()

    @function
    def cudaGetErrorString(self, error):
        return OK, {NO_MEMORY: b"out of memory"}.get(error, b"an illegal memory access was encountered")

    @function
    def cudaGetLastError(self):
        return (OK,)

    @function
    def cudaMemGetInfo(self):
        return OK, self.gpu.capacity - self.gpu.used, self.gpu.capacity

    # -- memory --------------------------------------------------------------------------------------------------------

    @function
    def cudaMalloc(self, size):
        if self.gpu.used + size > self.gpu.capacity:
            return NO_MEMORY, None
        return OK, self.gpu.take(size, DEVICE)

    @function
    def cudaMallocHost(self, size):
        return OK, self.gpu.take(size, PINNED)

    @function
    def cudaFree(self, address):
        self.gpu.release(address, DEVICE)
        return (OK,)

    @function
    def cudaFreeHost(self, address):
        self.gpu.release(address, PINNED)
        return (OK,)

    # -- copies --------------------------------------------------------------------------------------------------------

    @function
    def cudaMemcpyAsync(self, destination, source, size, kind, stream):
        self._copy(destination, source, size, size, 1, kind, stream, "cudaMemcpyAsync")
        return (OK,)

    @function
    def cudaMemcpy2DAsync(self, destination, to_pitch, source, pitch, width, rows, kind, stream):
        if to_pitch != pitch or width > pitch:
            self.gpu.complain(f"cudaMemcpy2DAsync: width {width}, pitches {to_pitch} and {pitch}")
        self._copy(destination, source, width, pitch, rows, kind, stream, "cudaMemcpy2DAsync")
        return (OK,)

    def _copy(self, destination, source, width, pitch, rows, kind, stream, what):
        gpu, size = self.gpu, (rows - 1) * pitch + width
        to, from_ = KINDS[kind]

        def places():
            return gpu.bytes(destination, size, what, to), gpu.bytes(source, size, what, from_)

        before = zlib.crc32(places()[1]) if from_ == PINNED else None

        def run():
            new, old = places()
            if before is not None and zlib.crc32(old) != before:
                gpu.complain(f"{what}: pinned memory {source:#x} changed before its copy ran")
            if to == PINNED:
                gpu.downloaded[gpu.name_of(source)] += size
            for row in range(rows):
                new[row * pitch :][:width] = old[row * pitch :][:width]

        gpu.put(gpu.stream(stream, what), Work(what, places, run))

    @function
    def cudaMemsetAsync(self, address, value, size, stream):
        place = lambda: self.gpu.bytes(address, size, "cudaMemsetAsync")
        self.gpu.put(self.gpu.stream(stream, "cudaMemsetAsync"), Work("memset", place, lambda: place().fill(value)))
        return (OK,)

    # -- streams and events --------------------------------------------------------------------------------------------

    @function
    def cudaStreamCreateWithFlags(self, flags):
        stream = Stream(self.gpu.handle())
        self.gpu.streams[stream.handle] = stream
        return OK, stream

    @function
    def cudaStreamSynchronize(self, stream):
        self.gpu.drain(self.gpu.stream(stream, "cudaStreamSynchronize"))
        return (OK,)

    @function
    def cudaStreamDestroy(self, stream):
        if self.gpu.streams.pop(int(stream)).queue:
            self.gpu.complain("a stream is destroyed while work is queued")
        return (OK,)

    @function
    def cudaEventCreateWithFlags(self, flags):
        event = Event(self.gpu.handle())
        self.gpu.events[event.handle] = event
        return OK, event

    @function
    def cudaEventRecord(self, event, stream):
        event.stream, event.reached = self.gpu.stream(stream, "cudaEventRecord"), False
        ticket = event.ticket = object()

        def reach():
            if event.ticket is ticket:  # not recorded again meanwhile
                event.reached = True

        self.gpu.put(event.stream, Work("event", lambda: None, reach))
        return (OK,)

    @function
    def cudaEventSynchronize(self, event):
        if not event.reached:
            self.gpu.drain(event.stream, until=lambda: event.reached)
        return (OK,)

    @function
    def cudaEventDestroy(self, event):
        del self.gpu.events[event.handle]
        return (OK,)

    @function
    def cudaStreamWaitEvent(self, stream, event, flags):
        def run():
            if not event.reached:
                self.gpu.drain(event.stream, until=lambda: event.reached)

        self.gpu.put(self.gpu.stream(stream, "cudaStreamWaitEvent"), Work("wait", lambda: None, run))
        return (OK,)

    # -- CUDA graphs ---------------------------------------------------------------------------------------------------

    @function
    def cudaStreamBeginCapture(self, stream, mode):
        stream.recording = []
        return (OK,)

    @function
    def cudaStreamEndCapture(self, stream):
        work, stream.recording = stream.recording, None
        return OK, Recorded(work)

    @function
    def cudaGraphInstantiate(self, graph, flags):
        made = Recorded(graph.work)
        self.gpu.graphs.add(made)
        return OK, made

    @function
    def cudaGraphDestroy(self, graph):
        return (OK,)

    @function
    def cudaGraphExecDestroy(self, graph):
        if any(work in stream.queue for stream in self.gpu.streams.values() for work in graph.work):
            self.gpu.complain("a CUDA graph is destroyed while it is queued")
        self.gpu.graphs.discard(graph)
        return (OK,)

    @function
    def cudaGraphLaunch(self, graph, stream):
        if graph not in self.gpu.graphs:
            self.gpu.complain("a CUDA graph is launched that does not exist")
        for work in graph.work:
            if work.context is not None and work.context.version != work.version:
                self.gpu.complain(f"{work.what}: the context was changed after its launch was recorded")
            self.gpu.put(stream, work)
        return (OK,)
