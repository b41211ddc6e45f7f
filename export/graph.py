"""A small builder for ONNX graphs: nodes, initializers, inputs, outputs, and where each initializer came from.

Knows: ONNX protobufs, opset 24, external data. Refuses to know: models, precision, backends.
A value is its name (a string). Weights are arrays kept beside the protobuf, so a graph may exceed 2 GB; lazy ones
(arrays.py) are made as they are written, one at a time, so it may exceed memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .arrays import Array, Lazy

OPSET = 24
IR_VERSION = 11
MICROSOFT = "com.microsoft"
DSPARK = "dspark"  # engines/kernels
INLINE_BYTES = 1024  # smaller initializers stay in model.onnx, where shape inference can read them
DATA_ALIGNMENT = 64

DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}


def every_node(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """`nodes` and those of their branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from every_node(attribute.g.node)


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: dtype as numpy spells it, shape of ints and symbol names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Graph:
    """One engine's graph under construction.

    `weights` maps an initializer's name to its array; `sources` maps it to the checkpoint tensors it was made of;
    `quantizable` names the MatMul weights that the int8 pass replaces, with their form (export/quantize.py).
    """

    def __init__(self, name: str):
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.quantizable: dict[str, str] = {}
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self._constants: dict[tuple, str] = {}
        self._count = 0

    def input(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> str:
        self.inputs.append(TensorSpec(name, dtype, shape))
        return name

    def output(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> None:
        """Declares the value `name` (made by some node) an output."""
        self.outputs.append(TensorSpec(name, dtype, shape))

    def op(self, op_type: str, *inputs: str, out: str | tuple[str, ...] | int = 1, domain: str = "", **attributes):
        """Adds a node. `out`: how many outputs, or their names. Returns one name, or a tuple of names."""
        if isinstance(out, int):
            self._count += 1
            stem = f"{op_type}_{self._count}"
            names = (stem,) if out == 1 else tuple(f"{stem}.{i}" for i in range(out))
        else:
            names = (out,) if isinstance(out, str) else tuple(out)
        self.nodes.append(helper.make_node(op_type, inputs, names, name=f"{names[0]}/{op_type}", domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def weight(self, name: str, array: Array, sources: tuple[str, ...] = ()) -> str:
        """Adds an initializer made of the checkpoint tensors `sources`."""
        if name in self.weights:
            raise ValueError(f"graph {self.name} already has an initializer {name}.")
        self.weights[name] = array if isinstance(array, Lazy) else np.asarray(array, order="C")
        self.sources[name] = sources
        return name

    def const(self, value, dtype: str = "int64") -> str:
        """A small constant, shared between equal uses."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(f"const_{len(self._constants)}", array)
        return self._constants[key]

    def reshape(self, x: str, *shape: int, out: str | int = 1) -> str:
        """Reshape to a static shape with at most one -1; 0 copies the input's dimension."""
        return self.op("Reshape", x, self.const(list(shape)), out=out)

    def prune(self) -> None:
        """Drops nodes that lead to no output, then initializers that no node reads."""
        wanted = {spec.name for spec in self.outputs}
        kept = []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                kept.append(node)
                wanted |= set(node.input)
        self.nodes = kept[::-1]
        self.weights = {name: array for name, array in self.weights.items() if name in wanted}
        self.sources = {name: self.sources[name] for name in self.weights}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """Value name -> the nodes that read it, in branches too."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in every_node(self.nodes):
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return readers

    def calls(self, domain: str) -> bool:
        """Whether an operator of this domain occurs."""
        return any(node.domain == domain for node in every_node(self.nodes))

    def used_sources(self) -> set[str]:
        """The checkpoint tensors that reach an output of this graph."""
        return {source for sources in self.sources.values() for source in sources}

    def save(self, folder: Path) -> None:
        """Writes model.onnx (and model.onnx.data when there is something to put there), then checks the model."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors, offset, large = [], 0, []
        for name, array in self.weights.items():
            if array.nbytes <= INLINE_BYTES:
                tensors.append(numpy_helper.from_array(np.asarray(array), name))
                continue
            offset = -(-offset // DATA_ALIGNMENT) * DATA_ALIGNMENT
            tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            large.append((offset, array))
            offset += array.nbytes
        if large:
            with open(folder / "model.onnx.data", "wb") as file:
                for position, array in large:
                    file.seek(position)
                    file.write(np.asarray(array, order="C").reshape(-1).view(np.uint8))
        value_info = lambda spec: helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype], spec.shape)
        graph = helper.make_graph(
            self.nodes, self.name, [value_info(s) for s in self.inputs], [value_info(s) for s in self.outputs], tensors
        )
        opsets = [helper.make_opsetid("", OPSET)]
        opsets += [helper.make_opsetid(domain, 1) for domain in (MICROSOFT, DSPARK) if self.calls(domain)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="dspark-triton", ir_version=IR_VERSION)
        onnx.save(model, folder / "model.onnx")
        onnx.checker.check_model(str(folder / "model.onnx"))
