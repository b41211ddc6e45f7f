"""The weight-only int8 pass of TensorRT's form: 8-bit weights behind a DequantizeLinear, products in half precision.

Knows: the arithmetic below, and which form TensorRT makes one kernel of. Refuses to know: models, activations.

Per output channel: s = max |w| of the column / 127, rounded up to a float16; q = round(w / s); the graph holds q
(int8) and s, and computes x @ float16(q * s). docs/quantization.md says why per channel and not per block.
"""

from __future__ import annotations

import numpy as np

from .arrays import applied
from .graph import Graph
from .precision import FULL

SMALLEST = np.float32(2.0**-24)  # float16's


def weights_only(g: Graph) -> None:
    """Replaces, in place, the weight of every MatMul in g.quantizable, except those that compute in float32 and the Markov
    bias, which is small."""
    names = {name for name in g.quantizable if not name.startswith((*FULL, "markov_head."))}
    nodes, g.nodes = g.nodes, []
    dequantized: dict[str, str] = {}
    for node in nodes:
        if node.op_type == "MatMul" and (name := node.input[1]) in names:
            if name not in dequantized:
                dequantized[name] = dequantize(g, name)
            node.input[1] = dequantized[name]
        g.nodes.append(node)
    g.quantizable = {}
    g.prune()


def dequantize(g: Graph, name: str) -> str:
    """The initializer `name` [K, N] as int8 with a scale a column, dequantised: float32 here, half after to_half."""
    array, sources = g.weights[name], g.sources[name]
    weight = g.weight(f"{name}.int8", applied(lambda w: rounded(w)[0], array, array.shape, np.int8), sources)
    scale = g.weight(f"{name}.scale", applied(lambda w: rounded(w)[1], array, array.shape[1:], np.float32), sources)
    return g.op("DequantizeLinear", weight, scale, axis=1)


def rounded(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K, N] float32 -> int8 [K, N] in -127..127 and scales [N], float32 numbers that float16 holds exactly; a column
    of zeros has float16's smallest."""
    wanted = np.maximum(weight.max(axis=0), -weight.min(axis=0)) / np.float32(127)
    scale = np.maximum(wanted, SMALLEST).astype(np.float16)
    scale = np.where(scale < wanted, np.nextafter(scale, np.float16(np.inf)), scale).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale
