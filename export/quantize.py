"""The int8 pass: a graph's big MatMuls with 8-bit weights, in one of two forms.

Knows: the arithmetic below. Refuses to know: models. Activations are never scaled per tensor: a token's result must not
depend on which tokens share its pass, or greedy decoding with and without speculation would differ.

"row": weights per output channel, activations per token, one integer product over the whole row.
    m = max |x| of the row;  a = round(127 x / m) + 128 (uint8);  y = (a - 128) @ W_int8 * (column scale / 127) * m
"row-or-none" is the same for inputs that may have no rows at all (the logits of a pass that wants none).
A row of zeros gives 0 / 0 = NaN, any finite integers, and y = 0 because m = 0. uint8 x int8 is what x86's VNNI
multiplies; CPUs without it (AVX2 only) may saturate the products, which the parity check of the export would show.

"block": weights (and, in ONNX Runtime's form, activations) scaled per BLOCK consecutive inputs, so that a huge channel
costs precision in its own block only. In standard ops the weights are dequantised by DequantizeLinear and the product
is float32; lower_onnxruntime makes the pair one MatMulNBits, whose 8-bit activations are its own affair. A lone row
needs five nodes fewer a product than in the row form, many rows take twice as long: --dtype int8-block64 takes blocks throughout.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto

from .arrays import applied
from .graph import Graph

ZERO_POINT = 128
STEP = 1 / 127
BLOCK = 64  # ONNX Runtime's kernels at 128 and 256 round a row alone and in a batch differently; 32 is slower


def quantize(g: Graph, *, blocks: bool = False) -> None:
    """Replaces every MatMul whose weight is in g.quantizable, in place; equal activations are quantised once. blocks:
    the block form for all."""
    nodes, rows = g.nodes, {}
    g.nodes = []
    for node in nodes:
        if node.op_type != "MatMul" or node.input[1] not in g.quantizable:
            g.nodes.append(node)
        elif blocks or g.quantizable[node.input[1]] == "block":
            block_matmul(g, node)
        else:
            x, form = node.input[0], g.quantizable[node.input[1]]
            if x not in rows:
                rows[x] = quantize_rows(g, x, may_be_none=form == "row-or-none")
            row_matmul(g, node, *rows[x])
    for name in g.quantizable:
        del g.weights[name], g.sources[name]
    g.quantizable = {}


def quantize_rows(g: Graph, x: str, *, may_be_none: bool = False) -> tuple[str, str]:
    """x [rows, K] -> (uint8 [rows, K] around 128, m [rows, 1])."""
    if may_be_none:  # of no rows, ONNX Runtime's ReduceMax makes [0, K]; TopK is right, but slow with many
        m = g.op("TopK", g.op("Abs", x), g.const([1]), out=2, axis=-1)[0]
    else:
        m = g.op("ReduceMax", g.op("Abs", x), g.const([-1]), keepdims=1)
    unit = g.op("Div", x, m)  # lies in [-1, 1]
    return g.op("QuantizeLinear", unit, g.const(STEP, "float32"), g.const(ZERO_POINT, "uint8")), m


def row_matmul(g: Graph, node: NodeProto, rows: str, m: str) -> None:
    """y = (rows - 128) @ W_int8 * column scale / 127 * m, under the MatMul's own output name."""
    name = node.input[1]
    array, weight, column = g.weights[name], f"{name}.int8", f"{name}.scale"
    if weight not in g.weights:  # the MatMuls of unrolled steps share theirs
        whole = applied(lambda w: quantize_columns(w)[0], array, array.shape, np.int8)
        g.weight(weight, whole, g.sources[name])
        steps = applied(lambda w: quantize_columns(w)[1] * np.float32(STEP), array, array.shape[1:], np.float32)
        g.weight(column, steps, g.sources[name])
    product = g.op("Cast", g.op("MatMulInteger", rows, weight, g.const(ZERO_POINT, "uint8")), to=1)
    g.op("Mul", g.op("Mul", product, column), m, out=node.output[0])


def block_matmul(g: Graph, node: NodeProto) -> None:
    """x @ DequantizeLinear(W_int8, scale a block and column), under the MatMul's own output name."""
    name = node.input[1]
    array, weight, scales = g.weights[name], f"{name}.int8", f"{name}.scale"
    if weight not in g.weights:  # as in row_matmul
        K, N = array.shape
        g.weight(weight, applied(lambda w: quantize_blocks(w)[0], array, (K, N), np.int8), g.sources[name])
        steps = applied(lambda w: quantize_blocks(w)[1], array, (-(-K // BLOCK), N), np.float32)
        g.weight(scales, steps, g.sources[name])
    g.op(
        "MatMul", node.input[0], g.op("DequantizeLinear", weight, scales, axis=0, block_size=BLOCK), out=node.output[0]
    )


def block_products(g: Graph) -> Iterator[tuple[int, NodeProto, str, str, int]]:
    """What block_matmul made: (place in g.nodes, the MatMul, its int8 weights, their scales, inputs a block)."""
    maker = {node.output[0]: node for node in g.nodes if node.op_type == "DequantizeLinear"}
    for i, node in enumerate(g.nodes):
        scaled = maker.get(node.input[1]) if node.op_type == "MatMul" else None
        if scaled is not None:
            yield i, node, *scaled.input, next(a.i for a in scaled.attribute if a.name == "block_size")


def quantize_columns(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K, N] float32 -> int8 [K, N] in -127..127 and float32 scales [N]; a column of zeros has scale 1."""
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def quantize_blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K, N] float32 -> int8 [K, N] in -127..127 and float32 scales [ceil(K / BLOCK), N], one a block of inputs and
    column; 0 for a block of zeros, which then gives exactly 0 (ONNX Runtime takes the offset of 128 off again in
    float32)."""
    parts = [quantize_columns(weight[k : k + BLOCK]) for k in range(0, len(weight), BLOCK)]
    scales = [np.where(array.any(axis=0), scale, np.float32(0)) for array, scale in parts]
    return np.concatenate([array for array, _ in parts]), np.stack(scales)
