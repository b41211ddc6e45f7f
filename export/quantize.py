"""The int8 pass ("row8"): a graph's big MatMuls with int8 weights per output channel and activations per token.

Knows: the arithmetic below. Refuses to know: models, backends. Activations are never scaled per tensor: a token's result
must not depend on which tokens share its pass, or greedy decoding with and without speculation would differ.

    m = max |x| of the row;  a = round(127 x / m) + 128 (uint8);  y = (a - 128) @ W_int8 * (column scale / 127) * m

A weight in g.quantizable with 2 terms gets a second product with what the first rounding left, at 1/254 of its step: the
activations are then as good as 15 bits. A row of zeros gives 0 / 0 = NaN, any finite integers, and y = 0 because m = 0.
uint8 x int8 is what x86's VNNI multiplies; CPUs without it (AVX2 only) may saturate the products, which the parity check of
the export would show.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from .graph import Graph

ZERO_POINT = 128
STEP, FINE_STEP = 1 / 127, 1 / 127 / 254


def quantize(g: Graph) -> None:
    """Replaces every MatMul whose weight is in g.quantizable, in place; equal activations are quantised once."""
    nodes, rows = g.nodes, {}
    g.nodes = []
    for node in nodes:
        if node.op_type == "MatMul" and node.input[1] in g.quantizable:
            x, terms = node.input[0], g.quantizable[node.input[1]]
            if (x, terms) not in rows:
                rows[x, terms] = quantize_rows(g, x, terms)
            integer_matmul(g, node, *rows[x, terms])
        else:
            g.nodes.append(node)
    for name in g.quantizable:
        del g.weights[name], g.sources[name]
    g.quantizable = {}


def quantize_rows(g: Graph, x: str, terms: int) -> tuple[list[str], str]:
    """x [rows, K] -> (one or two uint8 [rows, K] around 128, m [rows, 1])."""
    m = g.op("ReduceMax", g.op("Abs", x), g.const([1]), keepdims=1)
    unit, zero = g.op("Div", x, m), g.const(ZERO_POINT, "uint8")  # unit lies in [-1, 1]
    step = g.const(STEP, "float32")
    rows = [g.op("QuantizeLinear", unit, step, zero)]
    if terms == 2:
        left = g.op("Sub", unit, g.op("DequantizeLinear", rows[0], step, zero))
        rows.append(g.op("QuantizeLinear", left, g.const(FINE_STEP, "float32"), zero))
    return rows, m


def integer_matmul(g: Graph, node: NodeProto, rows: list[str], m: str) -> None:
    """y = sum over the terms of (rows - 128) @ W_int8 * step * column scale, times m, under the MatMul's own output name."""
    name = node.input[1]
    array, scale = quantize_columns(g.weights[name])
    weight = g.weight(f"{name}.int8", array, g.sources[name])
    total = None
    for i, (term, step) in enumerate(zip(rows, (STEP, FINE_STEP))):
        column = g.weight(f"{name}.scale.{i}", scale * np.float32(step), g.sources[name])
        product = g.op("Cast", g.op("MatMulInteger", term, weight, g.const(ZERO_POINT, "uint8")), to=1)
        product = g.op("Mul", product, column)
        total = product if total is None else g.op("Add", total, product)
    g.op("Mul", total, m, out=node.output[0])


def quantize_columns(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K, N] float32 -> int8 [K, N] in -127..127 and float32 scales [N]; a column of zeros has scale 1."""
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale
