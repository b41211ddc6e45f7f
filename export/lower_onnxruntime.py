"""ONNX Runtime's form of a graph: a pass that replaces standard ops where the CPU provider has a leaner one.

Knows: the com.microsoft ops that are worth it, and the patterns that export/ builds. Refuses to know: models,
precision. Measured on SmolLM2-135M (two cores): see docs/decisions.md.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from onnx import NodeProto, helper

from . import lower_native
from .arrays import applied
from .graph import MICROSOFT, Graph
from .idle_draws import lower_idle_draws
from .quantize import block_products

INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: activations in 8 bits, scaled per row and block


def lower(g: Graph, *, native: bool = False) -> None:
    """Rewrites `g` in place. native: products by 8-bit weights are those of engines/kernels."""
    if g.name == "target":
        lower_attention(g)
    lower_swish(g)
    lower_skip_norms(g)
    if native:
        lower_native.lower(g)
    lower_integer_matmuls(g)
    lower_block_matmuls(g)
    g.prune()
    check_order(g)
    lower_idle_draws(g)


def lower_attention(g: Graph) -> None:
    """Attention -> MatMul, Add, Softmax, MatMul, every query slot a product of its own with a single row.

    For one row ONNX Runtime reads keys and values where they lie; for a few it packs them first, which takes longer than
    the product (twice as long with 16 requests of one token). For hundreds of rows, a prompt, packing pays; but a slot's
    bits must not depend on its neighbours, and one kernel for all keeps that. With one key-value head Attention stays:
    there ONNX Runtime would make one product of many rows again, but only of a request that is alone.
    """
    nodes, g.nodes = g.nodes, []
    unsqueezed: dict[str, str] = {}
    kv_heads = {spec.name: spec.shape[1] for spec in g.outputs if spec.name.startswith("present.")}
    for node in nodes:
        if node.op_type != "Attention" or kv_heads.get(node.input[1]) == 1:
            g.nodes.append(node)
            continue
        q, k, v, mask = node.input  # q [R, H, S, D], k and v [R, H, C, D], mask [R, 1, S, C]
        scale = next(a.f for a in node.attribute if a.name == "scale")
        if scale != 1:  # FusedMatMul's own factor would take the other kernel
            q = g.op("Mul", q, g.const(scale, "float32"))
        if mask not in unsqueezed:
            unsqueezed[mask] = g.op("Unsqueeze", mask, g.const([3]))
        k, v = (g.op("Unsqueeze", x, g.const([2])) for x in (k, v))
        scores = g.op("FusedMatMul", g.op("Unsqueeze", q, g.const([3])), k, domain=MICROSOFT, transB=1)
        share = g.op("Softmax", g.op("Add", scores, unsqueezed[mask]), axis=-1)  # [R, H, S, 1, C]
        g.op("Squeeze", g.op("MatMul", share, v), g.const([3]), out=node.output[0])


def lower_swish(g: Graph) -> None:
    """Swish -> QuickGelu(alpha 1), one kernel; ONNX Runtime would inline Swish as Cast, Mul, Sigmoid, Mul."""
    for i, node in enumerate(g.nodes):
        if node.op_type == "Swish":
            g.nodes[i] = helper.make_node("QuickGelu", node.input, node.output, node.name, domain=MICROSOFT, alpha=1.0)


def lower_skip_norms(g: Graph) -> None:
    """Add followed by RMSNormalization over the last axis -> SkipSimplifiedLayerNormalization, which gives both; an
    RMSNormalization alone -> SimplifiedLayerNormalization.

    Only where the sum's first reader is the norm in the order of the graph, so that the order stays topological.
    """
    made_by = {node.output[0]: node for node in g.nodes if node.op_type == "Add"}
    drop: set[str] = set()
    for i, node in enumerate(g.nodes):
        if node.op_type != "RMSNormalization":
            continue
        eps = next(a.f for a in node.attribute if a.name == "epsilon")
        x, scale = node.input
        add = made_by.get(x)
        if add is not None and is_residual(g, add) and add.name not in drop:
            drop.add(add.name)
            outputs = [node.output[0], "", "", x]
            new = helper.make_node("SkipSimplifiedLayerNormalization", [*add.input, scale], outputs, node.name,
                                   domain=MICROSOFT, epsilon=eps)
            g.nodes[i] = new
    g.nodes = [n for n in g.nodes if n.name not in drop]


def lower_integer_matmuls(g: Graph) -> None:
    """MatMulInteger, Cast to float32, Mul by the column scale -> MatMulIntegerToFloat."""
    maker = {node.output[0]: node for node in g.nodes}
    for i, node in enumerate(g.nodes):
        cast = maker.get(node.input[0]) if node.op_type == "Mul" else None
        product = maker.get(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
        if product is None or product.op_type != "MatMulInteger" or node.input[1] not in g.weights:
            continue
        rows, weight, zero_point = product.input
        inputs = [rows, weight, g.const(1.0, "float32"), node.input[1], zero_point]
        g.nodes[i] = helper.make_node("MatMulIntegerToFloat", inputs, node.output, node.name, domain=MICROSOFT)


def lower_block_matmuls(g: Graph) -> None:
    """MatMul by int8 weights that DequantizeLinear scales per block of inputs -> MatMulNBits with 8-bit activations."""
    for i, node, name, scale, size in block_products(g):
        (K, N), blocks = g.weights[name].shape, len(g.weights[scale])
        packed, scales = f"{name}.packed", f"{scale}.packed"
        if packed not in g.weights:
            pack = partial(pack_blocks, blocks=blocks, size=size)
            g.weight(packed, applied(pack, g.weights[name], (N, blocks, size), np.uint8), g.sources[name])
            g.weight(scales, g.weights[scale].T, g.sources[scale])
        g.nodes[i] = helper.make_node(
            "MatMulNBits", [node.input[0], packed, scales], node.output, node.name, domain=MICROSOFT,
            K=K, N=N, bits=8, block_size=size, accuracy_level=INT8_ACTIVATIONS,
        )


def pack_blocks(weight: np.ndarray, blocks: int, size: int) -> np.ndarray:
    """int8 [K, N] -> uint8 [N, blocks, size] around 128, the last block padded with zeros (128)."""
    K, N = weight.shape
    padded = np.zeros((blocks * size, N), np.int16)
    padded[:K] = weight
    return (padded.T + 128).astype(np.uint8).reshape(N, blocks, size)


def is_residual(g: Graph, add: NodeProto) -> bool:
    """Both operands are activations (a bias is an initializer)."""
    return not any(name in g.weights for name in add.input)


def check_order(g: Graph) -> None:
    """Raises ValueError when a node reads a value that is made later."""
    known = {spec.name for spec in g.inputs} | set(g.weights)
    for node in g.nodes:
        if missing := [n for n in node.input if n and n not in known]:
            raise ValueError(f"graph {g.name}: node {node.name} reads {missing[0]} before it is made.")
        known |= set(node.output)
