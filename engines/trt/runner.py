"""One plan, run: its inputs put where it reads them, its outputs where the next engine finds them.

Knows: profiles, buffers, staging, recorded launches, what a plan says of itself. Refuses to know: which engine it is,
requests, batches. Has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
from numpy import ndarray

from ..arrays import Rows
from ..feeds import Declared, sizes_of
from ..specs import EngineSpec, TensorSpec
from .array import DeviceArray
from .build import DTYPES
from .context import BoundContext, Library
from .cuda import ALIGNMENT, Cuda, DeviceError, aligned
from .graphs import Graphs
from .profiles import Profile
from .staging import Staging

STORED = {"bfloat16": "uint16"}  # numpy has no bfloat16: its bits
STAGED_LARGE = ("noise", "hidden", "base_logits", "markov_embeddings", "logits", "features", "draft_probs")
# Inputs that are rarely numpy's: staging makes room for them when one is.


class Runner:
    """`name`, `spec`: of the engine, as the manifest has it; `to_host`: outputs that are copied to the host at once;
    `most_graphs`: recorded launches at most. Raises DeviceError for a plan that is not as the manifest says."""

    def __init__(
        self, library: Library, name: str, spec: EngineSpec, plan: Path, profiles: tuple[Profile, ...], *,
        to_host: tuple[str, ...], most_graphs: int,
    ):  # fmt: skip
        self.library, self.cuda, self.name, self.profiles = library, library.cuda, name, profiles
        self.engine = library.open(name, plan)
        is_cache = lambda s: s.name.startswith(("past_key_values.", "present."))
        self.cache_names = [s.name for s in spec.inputs if is_cache(s)]
        self.updated = {s.name for s in spec.outputs if is_cache(s)}  # none of an engine that only reads its caches
        self.inputs = [_declared(s) for s in spec.inputs if not is_cache(s)]
        self.outputs = [_declared(s) for s in spec.outputs if not is_cache(s)]
        self._check(spec)
        self.values = tuple(profiles[0].values)
        self.to_host = [name for name, _, _ in self.outputs if name in to_host]
        self.graphs = Graphs(self.cuda, most_graphs if library.api.records else 0)
        self._held: list = []

    @property
    def working_memory(self) -> int:
        """Bytes that its kernels take beside inputs and outputs."""
        engine = self.engine
        return int(engine.device_memory_size_v2)

    def allocate(self, scratch: tuple[int, int]) -> None:
        """Everything that a call needs. scratch: (address, bytes) shared by all engines, for one runs at a time."""
        cuda = self.cuda
        self.scratch = scratch
        self.bound = BoundContext(self.library, self.engine, self.name, scratch)
        self.buffers = {name: self._buffer(name, dtype, shape) for name, dtype, shape in self.outputs}
        self.nothing = cuda.allocate(ALIGNMENT, f"{self.name}'s empty inputs")  # TensorRT wants an address even then
        first = self.profiles[0]
        small = [(d, s) for n, d, s in self.inputs if n not in (*STAGED_LARGE, *self.values)]
        size = sum(aligned(prod(_most(shape, (first,))) * dtype.itemsize) for dtype, shape in small)
        self.staging = Staging(cuda, f"{self.name}'s inputs", size)
        ends, offset = {}, 0
        for name in self.to_host:
            ends[name] = (offset, offset + self.buffers[name].nbytes)
            offset = aligned(ends[name][1])
        self.pinned = cuda.allocate_pinned(max(offset, 1), f"{self.name}'s results")
        self._places = ends
        self.shape_values = cuda.allocate_pinned(ALIGNMENT * max(len(self.values), 1), f"{self.name}'s shape inputs")
        self.done = cuda.event()

    def _buffer(self, name: str, dtype: np.dtype, shape: tuple) -> DeviceArray:
        full = _most(shape, self.profiles)
        size = max(prod(full) * dtype.itemsize, 1)
        address = self.cuda.allocate(size, f"{self.name}'s output {name}")
        return DeviceArray(self.cuda, address, full, dtype, address + size)

    def profile(self, feeds: dict) -> int:
        """The first profile that holds a call. Raises ValueError, one sentence with the range that comes nearest."""
        sizes = sizes_of(self.name, self.inputs, feeds)
        sizes |= {name: int(feeds[name][0]) for name in self.values}
        outside = [
            [(n, sizes[n], r) for n, r in (p.sizes | p.values).items() if n in sizes and not r[0] <= sizes[n] <= r[2]]
            for p in self.profiles
        ]
        best = min(range(len(outside)), key=lambda i: len(outside[i]))
        if outside[best]:
            name, size, (least, _, most) = outside[best][0]
            raise ValueError(
                f"{self.name}: {name} is {size}, the plan's profile {self.profiles[best].name!r} takes "
                f"{least}..{most}; run less at once, or export again with a larger --max-requests, --chunk or "
                f"--max-context."
            )
        return best

    def run(self, feeds: dict, profile: int, cache: Callable[[str], int] | None = None) -> Results:
        """feeds: for each input numpy's array, a DeviceArray or Rows of both; what the graph does not use may be there
        too. cache: address of each cache input. Everything is queued, nothing is waited for."""
        if self._held:  # other libraries' arrays: their memory may be gone once we let go
            self.cuda.wait(self.done, self.name)
        taken = {name: feeds[name] for name, _, _ in self.inputs}
        self._held = [a for a in taken.values() if isinstance(a, DeviceArray) and a.owner is not None]
        sizes = sizes_of(self.name, self.inputs, taken)
        addresses = self._place(taken)
        for name in self.cache_names:
            addresses[name] = cache(name)
            if (present := name.replace("past_key_values.", "present.")) in self.updated:
                addresses[present] = addresses[name]
        shapes = {name: tuple(array.shape) for name, array in taken.items() if name not in self.values}
        shapes |= {name: shape for name, shape in self._cache_shapes(sizes)}
        values = tuple(int(taken[name][0]) for name in self.values)
        self._launch((profile, *shapes.values(), *addresses.values(), *values), profile, shapes, addresses)
        return self._results(sizes)

    def _place(self, taken: dict) -> dict[str, int]:
        """{input or output: address}; what is not yet on the GPU, or not aligned, is sent there."""
        places = {name: buffer.address for name, buffer in self.buffers.items()}
        host, device = {}, {}
        for i, name in enumerate(self.values):
            self.shape_values[ALIGNMENT * i :][:8].view(np.int64)[0] = taken[name][0]
            places[name] = self.shape_values.ctypes.data + ALIGNMENT * i  # TensorRT reads it when work is queued
        for name, array in taken.items():
            if name in self.values:
                continue
            if not prod(array.shape):
                places[name] = self.nothing
            elif isinstance(array, ndarray):
                host[name] = array
            elif isinstance(array, DeviceArray) and array.address % ALIGNMENT == 0:
                places[name] = array.address
            else:
                device[name] = array if isinstance(array, Rows) else Rows([array])
        if host or device:
            before = self.staging.generation
            try:
                places |= self.staging.send(host, device)
            finally:
                if self.staging.generation != before:
                    self.graphs.clear()  # their addresses are gone
        return places

    def _cache_shapes(self, sizes: dict[str, int]):
        for name in self.cache_names:
            yield name, (sizes["R"], *self._cache_dims[name])

    def _launch(self, key: tuple, profile: int, shapes: dict[str, tuple], addresses: dict[str, int]) -> None:
        if (graph := self.graphs.get(key)) is not None:
            self.cuda.launch(graph)
            return
        bound, record = self.bound, self.graphs.again(key)
        if record:
            try:
                bound = BoundContext(self.library, self.engine, self.name, self.scratch)
            except DeviceError:  # no room for another: go on as before
                self.graphs.most, record = 0, False
        bound.bind(profile, shapes, addresses)
        if not bound.enqueue():
            raise self.library.refuse(f"does not run {self.name}")
        if record:  # once for real, because TensorRT settles a new shape on the first run; then recorded
            if (graph := self.cuda.capture(bound.enqueue)) is None:
                self.graphs.most = 0
            else:
                self.graphs.keep(key, graph, bound)

    def _results(self, sizes: dict[str, int]) -> Results:
        device, host = {}, {}
        for name, dtype, shape in self.outputs:
            full = tuple(sizes[n] if isinstance(n, str) else n for n in shape)
            buffer = self.buffers[name]
            array = DeviceArray(self.cuda, buffer.address, full, dtype, buffer.end, pool=buffer.pool)
            if name not in self.to_host:
                device[name] = array
                continue
            start, _ = self._places[name]
            pinned = self.pinned[start : start + array.nbytes]
            if array.size:
                self.cuda.download(pinned, array.address, array.nbytes)
            host[name] = pinned.view(dtype).reshape(full)
        self.cuda.record(self.done)
        return Results(self.cuda, self.name, device, host, self.done)

    def close(self) -> None:
        """Lets go of everything TensorRT's; memory is the Cuda's to free."""
        self.graphs.clear()
        self.bound = self.engine = None
        self._held = []

    # -- what the plan says of itself ----------------------------------------------------------------------------------

    def _check(self, spec: EngineSpec) -> None:
        """Names, types, profiles, cache shapes and aliases of the plan against the manifest. Raises DeviceError."""
        engine, trt = self.engine, self.library.api.trt
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        declared = {s.name: s for s in (*spec.inputs, *spec.outputs)}
        odd = lambda what: DeviceError(f"the plan of {self.name} {what}; export the bundle again (python -m export).")
        if names != declared.keys():
            raise odd(f"and the manifest disagree about {sorted(names ^ declared.keys())[0]!r}")
        if engine.num_optimization_profiles != len(self.profiles):
            raise odd(f"has {engine.num_optimization_profiles} profiles, the manifest {len(self.profiles)}")
        for name, tensor in declared.items():
            if (dtype := engine.get_tensor_dtype(name).name) != DTYPES[tensor.dtype]:
                raise odd(f"has {name!r} as {dtype}, the manifest as {tensor.dtype}")
            host = engine.get_tensor_location(name) == trt.TensorLocation.HOST
            if host != (name in self.profiles[0].values):
                raise odd(f"wants {name!r} in {'host' if host else 'GPU'} memory, unlike its profile")
        self._cache_dims: dict[str, tuple[int, ...]] = {}
        for name in self.cache_names:
            present = name.replace("past_key_values.", "present.")
            if present in self.updated and (alias := engine.get_aliased_input_tensor(present)) != name:
                raise odd(f"does not update {name!r} in place: {present!r} shares memory with {alias or 'nothing'!r}")
            self._cache_dims[name] = tuple(engine.get_tensor_shape(name))[1:]


class Results:
    """An engine's outputs by name: arrays on the GPU as they are; numpy arrays are waited for when the first is read.
    An output that the graph has not is None."""

    def __init__(self, cuda: Cuda, engine: str, device: dict, host: dict, done):
        self._cuda, self._engine, self._device, self._host, self._done = cuda, engine, device, host, done
        self._waited = False

    def __getattr__(self, name: str):
        if name in self._device:
            return self._device[name]
        if name in self._host:
            if not self._waited:
                self._cuda.enter()
                self._cuda.wait(self._done, self._engine)
                self._waited = True
            return self._host[name]
        if name.startswith("_"):
            raise AttributeError(name)
        return None


def _declared(spec: TensorSpec) -> Declared:
    return spec.name, np.dtype(STORED.get(spec.dtype, spec.dtype)), spec.shape


def _most(shape: tuple, profiles: tuple[Profile, ...]) -> tuple[int, ...]:
    """The largest sizes of any profile."""
    return tuple(max(p.sizes[n][2] for p in profiles) if isinstance(n, str) else n for n in shape)
