"""The int8 pass ("row8"): a graph's big MatMuls with int8 weights per output channel and activations per token.

Knows: the arithmetic below. Refuses to know: models, backends. Activations are never scaled per tensor: a token's result
must not depend on which tokens share its pass, or greedy decoding with and without speculation would differ.

    m = max |x| of the row;  a = round(127 x / m) + 128 (uint8);  y = (a - 128) @ W_int8 * (column scale / 127) * m

A row of zeros gives 0 / 0 = NaN, any finite integers, and y = 0 because m = 0. uint8 x int8 is what x86's VNNI multiplies;
CPUs without it (AVX2 only) may saturate the products, which the parity check of the export would show.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from .graph import Graph

ZERO_POINT = 128


def quantize(g: Graph) -> None:
    """Replaces every MatMul whose weight is in g.quantizable, in place; equal activations are quantised once."""
    nodes, rows = g.nodes, {}
    g.nodes = []
    for node in nodes:
        if node.op_type == "MatMul" and node.input[1] in g.quantizable:
            x = node.input[0]
            if x not in rows:
                rows[x] = quantize_rows(g, x)
            integer_matmul(g, node, *rows[x])
        else:
            g.nodes.append(node)
    for name in g.quantizable:
        del g.weights[name], g.sources[name]
    g.quantizable = set()


def quantize_rows(g: Graph, x: str) -> tuple[str, str]:
    """x [rows, K] -> (uint8 [rows, K] around 128, m [rows, 1])."""
    m = g.op("ReduceMax", g.op("Abs", x), g.const([1]), keepdims=1)
    unit = g.op("Div", x, m)  # in [-1, 1]
    return g.op("QuantizeLinear", unit, g.const(1 / 127, "float32"), g.const(ZERO_POINT, "uint8")), m


def integer_matmul(g: Graph, node: NodeProto, rows: str, m: str) -> None:
    """y = (rows - 128) @ W_int8 * column * m, under the MatMul's own output name."""
    name = node.input[1]
    weight, scale = quantize_columns(g.weights[name])
    sources = g.sources[name]
    weight = g.weight(f"{name}.int8", weight, sources)
    column = g.weight(f"{name}.scale", scale / np.float32(127), sources)
    total = g.op("Cast", g.op("MatMulInteger", rows, weight, g.const(ZERO_POINT, "uint8")), to=1)
    g.op("Mul", g.op("Mul", total, column), m, out=node.output[0])


def quantize_columns(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K, N] float32 -> int8 [K, N] in -127..127 and float32 scales [N]; a column of zeros has scale 1."""
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale
