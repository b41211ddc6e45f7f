"""The five engines on ONNX Runtime (CPU): caches updated in place, outputs written into reused buffers.

Knows: sessions, I/O binding, threads. Refuses to know: requests, sampling, schedules.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy import ndarray

from . import greedy, hugepages, native
from .autoregressive import RowsBatch, StepsBatch
from .base import (
    BackboneBatch,
    BackboneResult,
    ConfidenceBatch,
    ConfidenceResult,
    MarkovBatch,
    MarkovResult,
    TargetBatch,
    TargetResult,
    VerifyBatch,
    VerifyResult,
    additive_mask,
)
from .bundle import Bundle, BundleError, EngineSpec, TensorSpec
from .caches import Caches
from .feeds import check_rows, sizes_of
from .specs import masks_of

_ORT_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


SPIN_US = 200
# Rows of one verify call, as float32: what one step of the graph hands to the next stays in the second-level cache
# (16 rows of 49,152; with 112 a drawn row takes 1.3 to 2 times as long).
VERIFY_BYTES = 3 << 20
PASS_WORTH = 7 << 10  # measured for SmolLM2 on two cores, prompts of 8 to 64 tokens beside 1 to 15 rows
PACKED_PASS_WORTH = 1 << 20  # attention over packed rows does nothing for an empty slot
_NOTHING = np.zeros(1)  # where empty arrays lie
KEPT_BYTES = 1 << 15  # inputs up to this size are copied to a place that stays bound, larger ones are bound where they lie


class OnnxRuntimeEngines:
    """`engines.base.Engines` on ONNX Runtime. `threads`: None = the physical cores this process may use."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, log_severity: int = 3):
        t, d = bundle.target, bundle.draft
        self.bundle = bundle
        self.verify_rows, self.pass_limits = max(1, VERIFY_BYTES // (4 * t.vocab_size)), None
        self.threads, self.provider = threads or physical_cores(), "CPUExecutionProvider"
        self.pass_worth = PACKED_PASS_WORTH if bundle.library else PASS_WORTH
        options = session_options(self.threads, log_severity, bundle.library)
        self.target_caches = Caches(t.cache_shapes, cache_dtype(bundle.engines["target"]))
        self.draft_caches = Caches(d.cache_shapes, cache_dtype(bundle.engines["backbone"]))
        caches = {"target": self.target_caches, "backbone": self.draft_caches, "markov": self.draft_caches}
        hugepages.gather()
        before = hugepages.places()
        self._graphs = {
            name: Graph(bundle.folder / spec.path, spec, options, caches.get(name))
            for name, spec in bundle.engines.items()
        }
        hugepages.ask(hugepages.places() - before)  # what the sessions took: their weights
        self._masks = {name: masks_of(spec) for name, spec in bundle.engines.items()}

    @property
    def target_capacity(self) -> int:
        return self.target_caches.capacity

    @property
    def cache_bytes(self) -> int:
        return self.target_caches.nbytes + self.draft_caches.nbytes

    @property
    def draft_capacity(self) -> int:
        return self.draft_caches.capacity

    def target(self, batch: TargetBatch) -> TargetResult:
        return TargetResult(**self._cached("target", batch))

    def backbone(self, batch: BackboneBatch | RowsBatch) -> BackboneResult:
        return BackboneResult(**self._cached("backbone", batch))

    def markov(self, batch: MarkovBatch | StepsBatch) -> MarkovResult:
        return MarkovResult(**self._cached("markov", batch))

    def _cached(self, name: str, batch) -> dict[str, ndarray]:
        """Runs an engine that may read or write caches, on the rows from batch.first_row on."""
        feeds = batch.__dict__ | {m: additive_mask(getattr(batch, m), dtype) for m, dtype in self._masks[name].items()}
        return self._graphs[name].run(feeds, feeds.pop("first_row", 0))

    def confidence(self, batch: ConfidenceBatch) -> ConfidenceResult:
        return ConfidenceResult(**self._graphs["confidence"].run(batch.__dict__))

    def verify(self, batch: VerifyBatch) -> VerifyResult:
        if greedy.is_plain(batch):
            return greedy.verify(batch)
        return VerifyResult(**self._graphs["verify"].run(batch.__dict__))

    def ensure_capacity(self, rows: int, length: int) -> None:
        self.target_caches.ensure(rows, length)
        self.draft_caches.ensure(rows, length)

    def move_row(self, source: int, destination: int, target_length: int, draft_length: int) -> None:
        self.target_caches.move_row(source, destination, target_length)
        self.draft_caches.move_row(source, destination, draft_length)

    def close(self) -> None:
        self._graphs.clear()
        self.target_caches.tensors.clear()
        self.draft_caches.tensors.clear()


class Graph:
    """One session. Small inputs are copied to places that stay bound, large ones bound where they lie; caches once per
    (first row, rows, generation), as input and output on the same memory; other outputs go to buffers that are kept and only grow."""

    def __init__(self, path: Path, spec: EngineSpec, options: ort.SessionOptions, caches: Caches | None):
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own unrelated types
            reason = str(error).splitlines()[0]
            raise BundleError(
                f"ONNX Runtime {ort.__version__} cannot open {path} ({reason}); export it again."
            ) from error
        check_graph(path, spec.inputs, self.session.get_inputs())
        check_graph(path, spec.outputs, self.session.get_outputs())
        self.name = path.parent.name
        is_cache = lambda n: n.startswith(("past_key_values.", "present."))
        self.inputs = [(s.name, np.dtype(s.dtype), s.shape) for s in spec.inputs if not is_cache(s.name)]
        self.outputs = [(s.name, np.dtype(s.dtype), s.shape) for s in spec.outputs if not is_cache(s.name)]
        self.cache_inputs = [s.name for s in spec.inputs if is_cache(s.name)]
        self.cache_outputs = {s.name for s in spec.outputs if is_cache(s.name)}  # none: it only reads them
        self.caches = caches if self.cache_inputs else None
        self.device = ort.OrtDevice.make("cpu", 0)._get_c_device()
        self.names = [name for name, _, _ in self.inputs]
        self._buffers: dict[str, ndarray] = {}
        self._bindings: dict[tuple[int, int], Binding] = {}
        self._generation = -1
        self._call = self._bound = self._results = None  # of the latest run

    def run(self, feeds: dict[str, ndarray | None], first_row: int = 0) -> dict[str, ndarray]:
        """feeds: an array per graph input, of the declared dtype and shape (else ValueError); what the graph does not
        use may be there too. Returns views of the buffers."""
        arrays = [feeds[name] for name in self.names]
        call = (first_row, [(a.shape, a.dtype) for a in arrays], self.caches and self.caches.generation)
        if call != self._call:  # else: the sizes are known to fit, and the outputs lie where they lay
            self._call = None
            sizes = sizes_of(self.name, self.inputs, feeds)
            self._bound = self._binding(first_row, sizes)
            self._results = self._outputs(self._bound, sizes)
            self._call = call
        binding = self._bound
        arrays = [binding.input(name, array) for name, array in zip(self.names, arrays)]  # they live until the run is over
        self.session._sess.run_with_iobinding(binding.values, None)
        return self._results

    def _outputs(self, binding: Binding, sizes: dict[str, int]) -> dict[str, ndarray]:
        """The views of the buffers that a call of these sizes writes, bound."""
        results = {}
        for name, dtype, shape in self.outputs:
            array = self._buffer(name, dtype, tuple(d if isinstance(d, int) else sizes[d] for d in shape))
            binding.output(name, array)
            results[name] = array
        return results

    def _buffer(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> ndarray:
        size = prod(shape)
        flat = self._buffers.get(name)
        if flat is None or flat.size < size:
            flat = self._buffers[name] = np.empty(max(size, 1), dtype)
        return flat[:size].reshape(shape)

    def _binding(self, first_row: int, sizes: dict[str, int]) -> Binding:
        """The binding of this row range, its caches already bound."""
        if self.caches is None:
            key = (0, 0)
        else:
            key = (first_row, sizes["R"])
            check_rows(self.name, first_row, sizes, self.caches.rows, self.caches.capacity)
            if self._generation != self.caches.generation:
                self._bindings.clear()
                self._generation = self.caches.generation
        if key not in self._bindings:
            binding = self._bindings[key] = Binding(self.session, self.device)
            for i, name in enumerate(self.cache_inputs):
                view = self.caches.view(i, *key)
                output = name.replace("past_key_values.", "present.")
                binding.input_at(name, view)
                if output in self.cache_outputs:
                    binding.output(output, view)
        return self._bindings[key]


class Binding:
    """The values of one graph by address. Binding costs more than comparing or copying a few numbers, and most places
    stay: the caches, the outputs' buffers, whatever is small or empty."""

    def __init__(self, session: ort.InferenceSession, device):
        self.values, self.device = ort.IOBinding(session)._iobinding, device
        self.places: dict[str, tuple] = {}
        self._kept: dict[str, ndarray] = {}

    def input(self, name: str, array: ndarray) -> ndarray:
        """Copies a small array to its place, binds a large one. Returns what is bound: it must live until the run is over."""
        kept = self._kept.get(name)
        if kept is not None and kept.shape == array.shape:
            kept[...] = array
            return kept
        if 0 < array.nbytes <= KEPT_BYTES:
            array = self._kept[name] = np.array(array, order="C")
        else:
            self._kept.pop(name, None)
            array = np.ascontiguousarray(array)
        self.input_at(name, array)
        return array

    def input_at(self, name: str, array: ndarray) -> None:
        self._bind(self.values.bind_input, name, array)

    def output(self, name: str, array: ndarray) -> None:
        self._bind(self.values.bind_output, name, array)

    def _bind(self, bind, name: str, array: ndarray) -> None:
        place = array.__array_interface__["data"][0] if array.size else _NOTHING.ctypes.data, array.shape
        if self.places.get(name) != place:
            bind(name, self.device, array.dtype.type, array.shape, place[0])
            self.places[name] = place


def session_options(threads: int, log_severity: int = 3, library: Path | None = None) -> ort.SessionOptions:
    """`threads` intra-op threads, one operator at a time. Five sessions share the cores: an idle thread spins for
    SPIN_US, long enough for the next operator and for the host's part of a round, too short to be in the way of the next
    session. `log_severity` 3 = errors only, 2 = warnings too. library: the bundle's operators."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = log_severity
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    if library:
        native.register(options, library)
    return options


def physical_cores() -> int:
    """Physical cores among the CPUs this process may run on (siblings counted once), at least 1."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in cpus:
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(file.read_text().strip() if file.is_file() else str(cpu))
    return max(1, len(cores))


def cache_dtype(spec: EngineSpec) -> str:
    """Of a graph's key-value caches."""
    return next((s.dtype for s in spec.inputs if s.name.startswith("past_key_values.")), "float32")


def check_graph(path: Path, declared: tuple[TensorSpec, ...], actual: list) -> None:
    """The graph's own names, dtypes and fixed dimensions against the manifest's."""
    names = {node.name: node for node in actual}
    if set(names) != {s.name for s in declared}:
        odd = sorted(set(names) ^ {s.name for s in declared})[0]
        raise BundleError(
            f"{path} and the manifest disagree about {odd!r}; export the bundle again (python -m export)."
        )
    for spec in declared:
        node = names[spec.name]
        dims = [d for d in zip(spec.shape, node.shape) if all(isinstance(x, int) for x in d)]
        same = len(spec.shape) == len(node.shape) and all(a == b for a, b in dims)
        if _ORT_DTYPES.get(node.type) != spec.dtype or not same:
            raise BundleError(
                f"{path}: {spec.name!r} is {node.type} {node.shape}, the manifest says {spec.dtype} "
                f"{list(spec.shape)}; export the bundle again (python -m export)."
            )
