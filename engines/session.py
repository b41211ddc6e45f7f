"""One ONNX Runtime session: arrays in, views of kept buffers out, everything bound by address.

Knows: I/O binding, which addresses stay. Refuses to know: what a graph computes, threads, requests.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy import ndarray

from .bundle import BundleError, EngineSpec, TensorSpec
from .caches import Caches
from .feeds import check_rows, sizes_of

_ORT_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
_NOTHING = np.zeros(1)  # where empty arrays lie
KEPT_BYTES = 1 << 15  # inputs up to this size are copied to a place that stays bound, larger ones are bound where they lie
LASTING_ROWS = 32  # of an output that is the caller's to keep: with more, memory for it costs more than copying what is wanted
OFTEN, MANY = 3, 64  # calls of like sizes after which they get a binding of their own; how many such sizes are remembered


class Graph:
    """One session. Small inputs are copied to places that stay bound, large ones bound where they lie; caches once per
    (first row, rows, generation), as input and output on the same memory; other outputs go to buffers that are kept and only grow.
    Sizes that come again and again keep a binding of their own, in which nothing is left to do but to copy what is new.
    lasting: an output that gets memory of its own in each call of at most LASTING_ROWS rows."""

    def __init__(
        self, path: Path, spec: EngineSpec, options: ort.SessionOptions, caches: Caches | None, lasting: str | None = None
    ):
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own unrelated types
            reason = str(error).splitlines()[0]
            raise BundleError(
                f"ONNX Runtime {ort.__version__} cannot open {path} ({reason}); export it again."
            ) from error
        check_graph(path, spec.inputs, self.session.get_inputs())
        check_graph(path, spec.outputs, self.session.get_outputs())
        self.name, self.lasting = path.parent.name, lasting
        is_cache = lambda n: n.startswith(("past_key_values.", "present."))
        self.inputs = [(s.name, np.dtype(s.dtype), s.shape) for s in spec.inputs if not is_cache(s.name)]
        self.outputs = [(s.name, np.dtype(s.dtype), s.shape) for s in spec.outputs if not is_cache(s.name)]
        self.cache_inputs = [s.name for s in spec.inputs if is_cache(s.name)]
        self.cache_outputs = {s.name for s in spec.outputs if is_cache(s.name)}  # none: it only reads them
        self.caches = caches if self.cache_inputs else None
        self.device = ort.OrtDevice.make("cpu", 0)._get_c_device()
        self.names = [name for name, _, _ in self.inputs]
        self._buffers: dict[str, ndarray] = {}
        self._bindings: dict[tuple[int, int], Binding] = {}  # by (first row, rows)
        self._generation = -1
        self._often: dict[tuple, tuple[Binding, dict[str, ndarray]]] = {}  # by the shapes of a call: its binding, its results
        self._seen: dict[tuple, int] = {}

    def run(self, feeds: dict[str, ndarray | None], first_row: int = 0) -> dict[str, ndarray]:
        """feeds: an array per graph input, of the declared dtype and shape (else ValueError); what the graph does not
        use may be there too. Returns views of the buffers."""
        arrays = [feeds[name] for name in self.names]
        if self.caches is not None and self._generation != self.caches.generation:
            self._forget()
            self._generation = self.caches.generation
        call = (first_row, *[(a.shape, a.dtype.char) for a in arrays])
        kept = self._often.get(call)  # its sizes are known to fit, its caches and outputs lie where they lay
        binding, results = kept if kept is not None else self._prepare(call, feeds, first_row)
        arrays = [binding.input(name, array) for name, array in zip(self.names, arrays)]  # they live until the run is over
        if self.lasting and len(kept_rows := results[self.lasting]) <= LASTING_ROWS:
            results = {**results, self.lasting: np.empty(kept_rows.shape, kept_rows.dtype)}
            binding.output(self.lasting, results[self.lasting])
        self.session._sess.run_with_iobinding(binding.values, None)
        return results

    def _prepare(self, call: tuple, feeds: dict[str, ndarray | None], first_row: int) -> tuple[Binding, dict[str, ndarray]]:
        """The binding and the results of a call whose sizes have no binding of their own, or that gets one now."""
        sizes = sizes_of(self.name, self.inputs, feeds)
        key = (0, 0)
        if self.caches is not None:
            key = (first_row, sizes["R"])
            check_rows(self.name, first_row, sizes, self.caches.rows, self.caches.capacity)
        if len(self._seen) >= 4 * MANY or len(self._often) >= MANY:  # yesterday's sizes make room; today's are soon back
            self._often.clear()
            self._seen.clear()
        self._seen[call] = seen = self._seen.get(call, 0) + 1
        if seen <= OFTEN:
            binding = self._bindings.get(key) or self._binding(*key)
            self._bindings[key] = binding
            return binding, self._outputs(binding, sizes)
        binding = self._binding(*key)
        self._often[call] = found = binding, self._outputs(binding, sizes)
        return found

    def _forget(self) -> None:
        self._bindings.clear()
        self._often.clear()
        self._seen.clear()

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
            self._often.clear()  # they write to the old one
        return flat[:size].reshape(shape)

    def _binding(self, first_row: int, rows: int) -> Binding:
        """A new binding, the caches of this row range bound."""
        binding = Binding(self.session, self.device)
        for i, name in enumerate(self.cache_inputs if self.caches is not None else ()):
            view = self.caches.view(i, first_row, rows)
            output = name.replace("past_key_values.", "present.")
            binding.input_at(name, view)
            if output in self.cache_outputs:
                binding.output(output, view)
        return binding


class Binding:
    """The values of one graph by address. Binding costs more than comparing or copying a few numbers, and most places
    stay: the caches, the outputs' buffers, whatever is small or empty."""

    def __init__(self, session: ort.InferenceSession, device):
        self.values, self.device = ort.IOBinding(session)._iobinding, device
        self.places: dict[str, tuple] = {}
        self._kept: dict[str, ndarray] = {}

    def input(self, name: str, array: ndarray) -> ndarray:
        """Copies a small array to its place, binds a large one. Returns what is bound: it must live until the run is over.
        A constant (read-only, its memory its own) is bound where it lies, and nothing is left to do when it comes again."""
        kept = self._kept.get(name)
        if kept is array:
            return array
        if kept is not None and kept.shape == array.shape and kept.flags.writeable:
            kept[...] = array
            return kept
        if array.base is None and not array.flags.writeable and array.flags.c_contiguous:
            self._kept[name] = array
        elif not 0 < array.nbytes <= KEPT_BYTES:
            self._kept.pop(name, None)
            array = np.ascontiguousarray(array)
        else:
            array = self._kept[name] = np.array(array, order="C")
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
