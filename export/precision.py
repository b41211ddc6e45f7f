"""The half-precision pass: a graph's matrix work and caches in float16 or bfloat16, everything else in float32.

Knows: which ops compute in half precision and which only move values; TensorRT 11 takes precision from the graph alone.
Refuses to know: models, backends.

In half precision: the operands of MatMul, Attention, RotaryEmbedding and TensorScatter, the caches, the mask (TensorRT
wants the query's type), embedding tables, and what only moves such values. In float32: the residual stream, norms,
activations, softmax and sampling, accept ratios, running sums, every other input and output, and the MatMuls whose
weight begins with a name of FULL: fc reads features that may exceed float16's range (Qwen3-8B's do), and confidences
decide. A float16 product that exceeds 65,504 is infinite: bfloat16 is the choice for targets with huge activations.
"""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
from onnx import NodeProto, TensorProto

from .arrays import applied
from .graph import Graph, TensorSpec

HALF = {  # dtype -> the type that it computes in
    "fp16": ("float16", np.dtype(np.float16)),
    "bf16": ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
    "w8a16": ("float16", np.dtype(np.float16)),  # 8-bit weights: export/weight_only.py
}
COMPUTES = {  # op -> the operands that become half
    "MatMul": (0, 1),
    "Attention": (0, 1, 2, 3),
    "RotaryEmbedding": (0, 1, 2),
    "TensorScatter": (0, 1),
    "DequantizeLinear": (1,),  # its scale gives its result's type
}
ROUNDS = ("MatMul", "Attention", "RotaryEmbedding", "DequantizeLinear")  # those that compute, not only move
MOVES = {"Gather", "GatherND", "Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Expand", "Concat"}
ANY_TYPE = {"Shape", "Cast"}  # read any type and give their own
FULL = ("fc.", "confidence_head.")
HALF_INPUTS = ("mask", "past_key_values.")
HALF_OUTPUTS = ("present.",)


def to_half(g: Graph, dtype: str) -> None:
    """Rewrites `g` in place; dtype: a key of HALF. Raises ValueError, one sentence, for a weight outside the type's
    range (a lazy weight: when it is written)."""
    Pass(g, dtype).run()
    g.prune()


def emulated(g: Graph, dtype: str) -> Graph:
    """A copy that rounds as the graph `g` of to_half does but holds float32, for ONNX Runtime's CPU provider: it has no
    bfloat16 kernels, computes float16 in float32, and drops most of the roundings between."""
    name, half_type = HALF[dtype]
    rounding = getattr(TensorProto, name.upper())
    as_float32 = lambda spec: TensorSpec(spec.name, "float32", spec.shape) if spec.dtype == name else spec
    copy = Graph(g.name)
    copy.inputs, copy.outputs = ([as_float32(spec) for spec in specs] for specs in (g.inputs, g.outputs))
    copy.weights = {
        w: array.astype(np.float32) if array.dtype == half_type else array for w, array in g.weights.items()
    }
    copy.sources = dict(g.sources)
    half = {spec.name for spec in g.inputs if spec.dtype == name} | {
        w for w, array in g.weights.items() if array.dtype == half_type
    }
    for original in g.nodes:
        node = NodeProto()
        node.CopyFrom(original)
        copy.nodes.append(node)
        cast = node.op_type == "Cast" and node.attribute[0].i == rounding
        typed = node.input[1 if node.op_type == "DequantizeLinear" else 0]  # the operand that gives the result's type
        if not cast and (typed not in half or node.op_type not in MOVES | COMPUTES.keys()):
            continue
        half |= set(node.output)
        if cast or node.op_type in ROUNDS:
            value = node.output[0]
            node.output[0], node.name = f"{value}.exact", f"{node.name}.exact"
            rounded = node.output[0] if cast else copy.op("Cast", node.output[0], to=rounding, out=f"{value}.rounded")
            copy.op("Cast", rounded, to=TensorProto.FLOAT, out=value)
    return copy


class Pass:
    """One rewriting: `half` holds the names of the values that are in half precision so far."""

    def __init__(self, g: Graph, dtype: str):
        self.graph, (self.name, self.type) = g, HALF[dtype]
        self.half: set[str] = set()
        self.full: dict[str, str] = {}  # half value -> its float32 copy
        self.cast: dict[str, str] = {}  # float32 value -> its half copy

    def run(self) -> None:
        g = self.graph
        g.inputs = [self.declared(spec, HALF_INPUTS) for spec in g.inputs]
        self.half |= {spec.name for spec in g.inputs if spec.dtype == self.name}
        nodes, g.nodes = g.nodes, []
        outputs = {spec.name for spec in g.outputs if not spec.name.startswith(HALF_OUTPUTS)}
        for node in nodes:
            self.rewrite(node, outputs)
        g.outputs = [self.declared(spec, HALF_OUTPUTS) for spec in g.outputs]

    def declared(self, spec: TensorSpec, prefixes: tuple[str, ...]) -> TensorSpec:
        return TensorSpec(spec.name, self.name, spec.shape) if spec.name.startswith(prefixes) else spec

    def rewrite(self, node: NodeProto, outputs: set[str]) -> None:
        """Appends the node with its operands cast; where its result is a float32 output of the graph, a Cast behind
        it."""
        computes = node.op_type in COMPUTES and not any(name.startswith(FULL) for name in node.input)
        if computes:
            for i in COMPUTES[node.op_type]:
                node.input[i] = self.as_half(node.input[i])
        elif node.op_type == "Gather" and self.is_table(node.input[0]):
            node.input[0] = self.as_half(node.input[0])
            computes = True
        elif node.op_type in MOVES:
            data = list(node.input) if node.op_type == "Concat" else [node.input[0]]
            computes = all(name in self.half for name in data)
        if not computes and node.op_type not in ANY_TYPE:
            for i, name in enumerate(node.input):
                node.input[i] = self.as_full(name)
        self.graph.nodes.append(node)
        if computes:
            for i, name in enumerate(node.output):
                if name in outputs:
                    node.output[i] = f"{name}.{self.name}"
                    self.graph.op("Cast", node.output[i], to=TensorProto.FLOAT, out=name)
                    self.full[node.output[i]] = name
                self.half.add(node.output[i])

    def is_table(self, name: str) -> bool:
        """A floating-point matrix of the checkpoint, of which a Gather takes rows."""
        array = self.graph.weights.get(name)
        return array is not None and array.dtype == np.float32 and array.ndim == 2 and bool(self.graph.sources[name])

    def as_half(self, name: str) -> str:
        if name in self.half or not name:
            return name
        if name not in self.cast:
            if name in self.graph.weights:
                self.cast[name] = self.convert(name)
            else:
                self.cast[name] = self.graph.op("Cast", name, to=getattr(TensorProto, self.name.upper()))
            self.half.add(self.cast[name])
        return self.cast[name]

    def as_full(self, name: str) -> str:
        if name not in self.half:
            return name
        if name not in self.full:
            self.full[name] = self.graph.op("Cast", name, to=TensorProto.FLOAT)
        return self.full[name]

    def convert(self, name: str) -> str:
        """The weight in half precision, as an initializer beside it (the float32 one goes when nothing reads it)."""
        g = self.graph
        convert = partial(in_half, kind=self.type, what=f"graph {g.name}: weight {name}")
        array = applied(convert, g.weights[name], g.weights[name].shape, self.type)
        return g.weight(f"{name}.{self.name}", array, g.sources[name])


def in_half(array: np.ndarray, kind: np.dtype, what: str) -> np.ndarray:
    """The array in float16 or bfloat16. Raises ValueError, one sentence, for a value outside the type's range."""
    largest = float(max(array.max(initial=0), -array.min(initial=0)))
    limit = float(ml_dtypes.finfo(kind).max)
    if largest > limit:
        raise ValueError(f"{what} holds {largest:.4g}, {kind.name} ends at {limit:.4g}; export with --dtype bf16.")
    return array.astype(kind, order="C")
