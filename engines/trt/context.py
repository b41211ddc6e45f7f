"""TensorRT's runtime as one process has it, and an execution context with what is set on it.

Knows: the runtime's calls and how each of them fails (several answer False or None and do not raise). Refuses to know:
buffers, profiles' meaning, recorded launches. Has never run on a GPU.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

from .api import Api, new_context
from .cuda import Cuda, DeviceError
from .log import BuildLog


@dataclass(frozen=True)
class Library:
    """TensorRT as one process has it: which of the two, its Runtime, what it logs, memory for its kernels."""

    api: Api
    cuda: Cuda
    runtime: object
    log: BuildLog

    def refuse(self, what: str) -> DeviceError:
        return DeviceError(f"{self.api.backend} {self.api.version} {what}: {self.log.reason()}.")

    def open(self, name: str, plan: Path):
        """The plan deserialized. Raises DeviceError with TensorRT's words."""
        runtime = self.runtime
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self.refuse(f"does not open the plan of {name}")
        return engine


class BoundContext:
    """One execution context and what is set on it, so that only what changes is set again."""

    def __init__(self, library: Library, engine, name: str, scratch: tuple[int, int]):
        self.library, self.name = library, name
        context = new_context(library.api, engine)
        if context is None:
            raise library.refuse(f"makes no execution context for {name}")
        context.set_device_memory(*scratch)
        self.context, self.profile = context, -1
        self.shapes: dict[str, tuple] = {}
        self.addresses: dict[str, int] = {}

    def bind(self, profile: int, shapes: dict[str, tuple], addresses: dict[str, int]) -> None:
        """Raises DeviceError where TensorRT takes a shape or an address not."""
        context, stream = self.context, self.library.cuda.handle
        if profile != self.profile:
            if not context.set_optimization_profile_async(profile, stream):
                raise self.library.refuse(f"does not take profile {profile} of {self.name}")
            self.profile, self.shapes = profile, {}  # a new profile forgets the shapes
        for name, address in addresses.items():
            if self.addresses.get(name) != address:
                if not context.set_tensor_address(name, address):
                    raise self.library.refuse(f"does not take the address of {name} of {self.name}")
                self.addresses[name] = address
        for name, shape in shapes.items():
            if self.shapes.get(name) != shape:
                if not context.set_input_shape(name, shape):
                    raise self.library.refuse(f"does not take {name} {list(shape)} of {self.name}")
                self.shapes[name] = shape

    def enqueue(self) -> bool:
        context = self.context
        return context.execute_async_v3(self.library.cuda.handle)
