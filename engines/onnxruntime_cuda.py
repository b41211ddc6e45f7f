"""The five engines on ONNX Runtime's CUDA provider: caches and activations stay on the GPU, ids and counts come back.

Knows: sessions of a GPU provider, what of a call crosses to the host. Refuses to know: requests, sampling, schedules.
The same code runs on Device("cpu"), which is how it is tested: it has never run on a GPU.
"""

from __future__ import annotations

import math
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import onnxruntime as ort
from numpy import ndarray

from .arrays import Rows
from .assignment import RECORD, Node, nodes_of, sentence
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
from .bundle import Bundle, BundleError, EngineSpec
from .device_memory import DeviceArray, DeviceCaches, Memory
from .devices import Device
from .feeds import check_rows, sizes_of
from .onnxruntime import cache_dtype, physical_cores, session_options
from .session import check_graph
from .specs import masks_of

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install -c constraints.txt 'onnxruntime-gpu[cuda,cudnn]'"
# TF32 off: fp32 graphs are the reference, and greedy decoding is compared with it token for token.
OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
# Outputs that the host reads; all others stay on the device.
TO_HOST = {
    "draft_tokens", "draft_indices", "confidence_logits", "accepted", "next_tokens", "complete", "log_probs"
}  # fmt: skip
_NOTHING = np.zeros(1)  # where empty arrays lie
PASS_WORTH = 1 << 15  # not measured: a GPU's slots are cheaper than a CPU's


class DeviceEngines:
    """`engines.base.Engines` on `device`. Raises BundleError, one sentence, where there is no such GPU, no provider for
    it, or a node of a graph that would run on the CPU. `assignment`: {graph: its nodes with their providers}."""

    pass_worth = PASS_WORTH

    def __init__(self, bundle: Bundle, device: Device, *, threads: int | None = None):
        t, d, specs = bundle.target, bundle.draft, bundle.engines
        self.bundle, self.threads = bundle, threads or physical_cores()
        self.verify_rows = self.pass_limits = None
        provider = CUDA if device.kind == "cuda" else CPU
        check_provider(device)
        try:
            self.memory = Memory(device)
        except RuntimeError as error:
            raise BundleError(f"{str(error)[:-1]}: there is no such GPU or no driver for it; see nvidia-smi.") from None
        dtype = cache_dtype(specs["target"])
        self.target_caches = DeviceCaches(self.memory, t.cache_shapes, dtype)
        dtype = cache_dtype(specs["backbone"])
        self.draft_caches = DeviceCaches(self.memory, d.cache_shapes, dtype)
        caches = {"target": self.target_caches, "backbone": self.draft_caches, "markov": self.draft_caches}
        self._graphs = {
            name: DeviceGraph(bundle, name, spec, self.memory, caches.get(name), provider, self.threads)
            for name, spec in specs.items()
        }
        self.provider = provider if provider == CPU else f"{CUDA} on {gpu_name(device)}"
        self.assignment: dict[str, tuple[Node, ...]] = {name: g.nodes for name, g in self._graphs.items()}
        self._masks = {name: masks_of(spec) for name, spec in specs.items()}

    @property
    def target_capacity(self) -> int:
        return self.target_caches.capacity

    @property
    def draft_capacity(self) -> int:
        return self.draft_caches.capacity

    @property
    def cache_bytes(self) -> int:
        return self.target_caches.nbytes + self.draft_caches.nbytes

    def target(self, batch: TargetBatch) -> TargetResult:
        return TargetResult(**self._cached("target", batch))

    def backbone(self, batch: BackboneBatch | RowsBatch) -> BackboneResult:
        return BackboneResult(**self._cached("backbone", batch))

    def markov(self, batch: MarkovBatch | StepsBatch) -> MarkovResult:
        return MarkovResult(**self._cached("markov", batch))

    def confidence(self, batch: ConfidenceBatch) -> ConfidenceResult:
        return ConfidenceResult(**self._graph("confidence").run(batch.__dict__))

    def verify(self, batch: VerifyBatch) -> VerifyResult:
        return VerifyResult(**self._graph("verify").run(batch.__dict__))

    def _cached(self, name: str, batch) -> dict:
        """Runs an engine that may read or write caches, on the rows from batch.first_row on."""
        feeds = batch.__dict__ | {m: additive_mask(getattr(batch, m), dtype) for m, dtype in self._masks[name].items()}
        return self._graph(name).run(feeds, feeds.pop("first_row", 0))

    def _graph(self, name: str) -> DeviceGraph:
        if name not in self._graphs:
            raise RuntimeError(f"{name} is called on engines that are closed.")
        return self._graphs[name]

    def ensure_capacity(self, rows: int, length: int) -> None:
        self.target_caches.ensure(rows, length)
        self.draft_caches.ensure(rows, length)

    def move_row(self, source: int, destination: int, target_length: int, draft_length: int) -> None:
        self.target_caches.move_row(source, destination, target_length)
        self.draft_caches.move_row(source, destination, draft_length)

    def close(self) -> None:
        self.memory.wait()
        self._graphs.clear()
        self.target_caches.close()
        self.draft_caches.close()


class DeviceGraph:
    """One session. numpy inputs are handed over at each call (ONNX Runtime takes them to where the graph reads them:
    indices that it wants on the host stay there), device arrays and caches by their address."""

    def __init__(
        self, bundle: Bundle, name: str, spec: EngineSpec, memory: Memory, caches: DeviceCaches | None, provider: str,
        threads: int,
    ):  # fmt: skip
        path = bundle.folder / spec.path
        self.name, self.memory = name, memory
        self.session = open_session(path, memory.device, provider, threads)
        self.nodes = nodes_of(self.session.get_provider_graph_assignment_info())
        if wrong := sentence(name, self.nodes, provider):
            raise BundleError(f"{bundle.folder}: {wrong}")
        check_graph(path, spec.inputs, self.session.get_inputs())
        check_graph(path, spec.outputs, self.session.get_outputs())
        is_cache = lambda n: n.startswith(("past_key_values.", "present."))
        self.inputs = [(s.name, np.dtype(s.dtype), s.shape) for s in spec.inputs if not is_cache(s.name)]
        self.outputs = [(s.name, np.dtype(s.dtype), s.shape) for s in spec.outputs if not is_cache(s.name)]
        self.cache_inputs = [s.name for s in spec.inputs if is_cache(s.name)]
        self.cache_outputs = {s.name for s in spec.outputs if is_cache(s.name)}  # none: it only reads them
        self.caches = caches if self.cache_inputs else None
        where = memory.device.kind, memory.device.index
        self.device = ort.OrtDevice.make(*where)._get_c_device()
        self.host = ort.OrtDevice.make("cpu", 0)._get_c_device()
        self._bindings: dict[tuple[int, int], object] = {}  # by first row and rows
        self._generation = -1
        self._buffers: dict[str, DeviceArray] = {}  # flat, by the name of what lies there; they only grow

    def run(self, feeds: dict, first_row: int = 0) -> dict[str, ndarray | DeviceArray]:
        """feeds: for each input an array of the declared dtype and shape (else ValueError), numpy's, on the device, or
        Rows. Outputs are views of the buffers, those of TO_HOST numpy arrays."""
        sizes = sizes_of(self.name, self.inputs, feeds)
        values = self._binding(first_row, sizes)
        kept = []  # what is bound must live until the run is over
        for name, dtype, _ in self.inputs:
            array = feeds[name]
            if isinstance(array, Rows):
                rows, array = array, self._buffer(name, array.shape, array.dtype)
                array.fill(rows)
            on_host = isinstance(array, ndarray)
            array = np.ascontiguousarray(array) if on_host else array
            kept.append(array)
            values.bind_input(name, self.host if on_host else self.device, dtype.type, array.shape, _address(array))
        results = {}
        for name, dtype, shape in self.outputs:
            shape = tuple(d if isinstance(d, int) else sizes[d] for d in shape)
            to_host = name in TO_HOST
            array = results[name] = np.empty(shape, dtype) if to_host else self._buffer(name, shape, dtype)
            values.bind_output(name, self.host if to_host else self.device, dtype.type, shape, _address(array))
        self.memory.wait()
        self.session._sess.run_with_iobinding(values, None)
        return results

    def _binding(self, first_row: int, sizes: dict[str, int]):
        """The values of this row range, its caches already bound, input and output at the same address: the graph
        writes into them."""
        rows = (first_row, sizes["R"]) if self.caches is not None else (0, 0)
        if self.caches is not None:
            check_rows(self.name, first_row, sizes, self.caches.rows, self.caches.capacity)
            if self._generation != self.caches.generation:
                self._bindings.clear()
                self._generation = self.caches.generation
        if rows not in self._bindings:
            values = self._bindings[rows] = ort.IOBinding(self.session)._iobinding
            for i, name in enumerate(self.cache_inputs):
                kind, (address, shape) = self.caches.dtype.type, self.caches.place(i, *rows)
                values.bind_input(name, self.device, kind, shape, address)
                if (output := name.replace("past_key_values.", "present.")) in self.cache_outputs:
                    values.bind_output(output, self.device, kind, shape, address)
        return self._bindings[rows]

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        size = math.prod(shape)
        flat = self._buffers.get(name)
        if flat is None or len(flat) < size:
            flat = self._buffers[name] = DeviceArray.new(self.memory, (max(size, 1),), dtype)
        return DeviceArray(self.memory, flat.owner, flat.address, shape, dtype)


def _address(array: ndarray | DeviceArray) -> int:
    if isinstance(array, DeviceArray):
        return array.address
    return array.ctypes.data if array.size else _NOTHING.ctypes.data


def check_provider(device: Device) -> None:
    """Raises BundleError, one sentence, when this onnxruntime has no provider for the device."""
    if device.kind == "cuda":
        if CUDA not in ort.get_available_providers():
            raise BundleError(f"onnxruntime {ort.__version__} here is a build without CUDA; replace it: {INSTALL}.")
        with redirect_stdout(StringIO()):  # it prints what it does not find; open_session says that in one sentence
            ort.preload_dlls(directory="")  # CUDA's own wheels, where they are installed


def open_session(path, device: Device, provider: str, threads: int) -> ort.InferenceSession:
    """Raises BundleError, one sentence, when the graph does not open or the provider does not start."""
    options = session_options(threads)
    options.add_session_config_entry(*RECORD)
    gpu = [(CUDA, {"device_id": str(device.index), **OPTIONS})] if provider == CUDA else []
    try:
        session = ort.InferenceSession(str(path), options, providers=[*gpu, CPU])
    except Exception as error:  # ONNX Runtime raises its own unrelated types
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"ONNX Runtime {ort.__version__} cannot open {path} on {device}: {reason}") from error
    if provider not in session.get_providers():  # it falls back to the CPU without an error
        raise BundleError(
            f"ONNX Runtime's CUDA provider does not start on {device}: no GPU, no driver or no CUDA 13 libraries here; "
            f"see nvidia-smi, and: {INSTALL}."
        )
    return session


def gpu_name(device: Device) -> str:
    """As CUDA calls it."""
    from cuda.bindings import runtime

    status, properties = runtime.cudaGetDeviceProperties(device.index)
    return str(device) if status else properties.name.decode()
