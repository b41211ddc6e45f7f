"""One written graph in ONNX Runtime: arrays in, arrays out.

Knows: sessions, caches bound in place. Refuses to know: what a graph computes, and the serving engines.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from engines.native import register

from .graph import Graph

MASKED = np.float32(-1e30)
LOWEST_HALF = np.float32(-3e4)  # MASKED in float16, where -1e30 would be infinite


class Runner:
    """One graph's session on two threads, with caches (if it has any) bound in place; `caches`: another's, to read; library:
    the operators of engines/kernels."""

    def __init__(
        self, folder: Path, graph: Graph, rows: int = 0, length: int = 0, caches: dict | None = None, library: Path | None = None
    ):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leave the cores to who needs them
        if library is not None:
            register(options, library)
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        check_signature(self.session, graph)
        self.inputs = [s for s in graph.inputs if not s.name.startswith("past_key_values.")]
        self.outputs = [s.name for s in graph.outputs if not s.name.startswith("present.")]
        self.caches, self.updated = {}, {s.name for s in graph.outputs if s.name.startswith("present.")}
        for s in graph.inputs:
            if s.name.startswith("past_key_values.") and caches is not None:
                self.caches[s.name] = caches[s.name]
            elif s.name.startswith("past_key_values."):
                shape = [{"R": rows, "C": length}.get(n, n) for n in s.shape]
                self.caches[s.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, s.dtype))

    def reset(self) -> None:
        """Zeros in all caches."""
        for cache in self.caches.values():
            cache.update_inplace(np.zeros_like(cache.numpy()))

    def __call__(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        binding = self.session.io_binding()
        for s in self.inputs:
            array = feeds[s.name] if s.dtype != "float16" else np.maximum(feeds[s.name], LOWEST_HALF)
            array = np.ascontiguousarray(array, dtype=s.dtype)
            binding.bind_ortvalue_input(s.name, ort.OrtValue.ortvalue_from_numpy(array))
        present = {}
        for name, value in self.caches.items():
            binding.bind_ortvalue_input(name, value)
            if (output := name.replace("past_key_values.", "present.")) in self.updated:
                binding.bind_ortvalue_output(output, value)
                present[output] = value
        for name in self.outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        arrays = dict(zip([*present, *self.outputs], binding.get_outputs()))
        return {name: arrays[name].numpy() for name in self.outputs}


def check_signature(session: ort.InferenceSession, graph: Graph) -> None:
    """Raises ValueError when the written model's names or shapes are not those that the manifest will state."""
    for what, declared, found in (
        ("inputs", graph.inputs, session.get_inputs()), ("outputs", graph.outputs, session.get_outputs())
    ):
        have, want = [(f.name, list(f.shape)) for f in found], [(s.name, list(s.shape)) for s in declared]
        if have != want:
            odd = next((h, w) for h, w in zip([*have, None], [*want, None]) if h != w)
            raise ValueError(f"graph {graph.name}: its {what} are not as declared: {odd[0]} instead of {odd[1]}.")
