"""The CPU kernels' form of a graph: what engines/kernels computes in one operator each (docs/kernels.md).

Knows: the patterns that export/ builds and the layout of a panel. Refuses to know: models, compilers, how a kernel works.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from onnx import NodeProto, helper

from .arrays import applied
from .graph import DSPARK, Graph
from .quantize import BLOCK, ZERO_POINT, block_products

PANEL = 32  # outputs whose weights lie together: engines/kernels/kernels.h


def lower(g: Graph) -> None:
    """Rewrites `g` in place, behind lower_onnxruntime's swish and norms."""
    lower_block_matmuls(g)
    lower_gates(g)
    lower_norms(g)


def lower_block_matmuls(g: Graph) -> None:
    """MatMul by int8 weights that DequantizeLinear scales per block of inputs -> BlockMatMul."""
    for i, node, name, scale, _ in block_products(g):
        K, N = g.weights[name].shape
        panels, blocks = -(-N // PANEL), len(g.weights[scale])
        packed = f"{name}.panels"
        if packed not in g.weights:
            shape = panels, blocks, BLOCK * PANEL + 4 * PANEL
            pack = partial(pack_panels, steps=g.weights[scale])
            g.weight(packed, applied(pack, g.weights[name], shape, np.uint8), g.sources[name])
        g.nodes[i] = helper.make_node(
            "BlockMatMul", [node.input[0], packed], node.output, node.name, domain=DSPARK, K=K, N=N, gated=0
        )


def lower_gates(g: Graph) -> None:
    """Split, QuickGelu (Swish) of the first half, Mul by the second, BlockMatMul -> BlockMatMul, gated."""
    maker = {name: node for node in g.nodes for name in node.output}
    readers = g.consumers()
    for node in g.nodes:
        product = maker.get(node.input[0]) if node.op_type == "BlockMatMul" else None
        if product is None or product.op_type != "Mul" or len(readers[product.output[0]]) > 1:
            continue
        swish = maker.get(product.input[0])
        halves = maker.get(swish.input[0]) if swish is not None and swish.op_type in ("Swish", "QuickGelu") else None
        if halves is None or halves.op_type != "Split" or list(halves.output) != [swish.input[0], product.input[1]]:
            continue
        node.input[0] = halves.input[0]
        next(a for a in node.attribute if a.name == "gated").i = 1
    g.prune()


def lower_norms(g: Graph) -> None:
    """SkipSimplifiedLayerNormalization whose norm one BlockMatMul alone reads -> NormMatMul."""
    maker = {node.output[0]: node for node in g.nodes if node.op_type == "SkipSimplifiedLayerNormalization"}
    readers, outputs = g.consumers(), {spec.name for spec in g.outputs}
    places = {id(node): i for i, node in enumerate(g.nodes)}
    gone = set()
    for node in list(g.nodes):
        norm = maker.get(node.input[0]) if node.op_type == "BlockMatMul" else None
        if norm is None or len(readers[norm.output[0]]) > 1 or norm.output[0] in outputs:
            continue
        sizes = {a.name: a.i for a in node.attribute}
        if sizes["gated"]:
            continue
        epsilon = next(a.f for a in norm.attribute if a.name == "epsilon")
        g.nodes[places[id(norm)]] = helper.make_node(
            "NormMatMul", [*norm.input, node.input[1]], [node.output[0], norm.output[3]], node.name, domain=DSPARK,
            K=sizes["K"], N=sizes["N"], epsilon=epsilon,
        )
        gone.add(node.name)
    g.nodes = [n for n in g.nodes if n.op_type != "BlockMatMul" or n.name not in gone]


def lower_greedy_slots(g: Graph, nodes: list[NodeProto]) -> list[NodeProto]:
    """`nodes` give what a vanilla Markov head drafts when nobody draws, slot by slot -> one GreedyMarkov. Others come back as they
    are: a gated or rnn head, a product in another form, no head."""
    steps = [node for node in nodes if node.op_type == "BlockMatMul"]
    maker = {name: node for node in nodes for name in node.output}
    embedded = [maker.get(step.input[0]) for step in steps]
    outputs = {spec.name: spec for spec in g.outputs}
    if (
        "markov_embeddings" not in outputs
        or len(steps) != outputs["draft_tokens"].shape[1]
        or len({step.input[1] for step in steps}) > 1
        or any(node is None or node.op_type != "Gather" or node.input[0] not in g.weights for node in embedded)
    ):
        return nodes
    to_target = "draft_to_target" if "draft_to_target" in g.weights else g.const(np.zeros(0, np.int64))
    places = "base_logits", "anchor_ids", embedded[0].input[0], steps[0].input[1], to_target
    names = "draft_tokens", "draft_indices", "markov_embeddings"
    whole = helper.make_node("GreedyMarkov", places, names, name="greedy/GreedyMarkov", domain=DSPARK)
    return [whole, *(node for node in nodes if node.output[0] == "draft_probs")]


def pack_panels(weight: np.ndarray, steps) -> np.ndarray:
    """int8 [K, N], steps float32 [blocks, N] -> uint8 [panels, blocks, BLOCK * PANEL + 4 * PANEL]: of PANEL outputs and BLOCK
    inputs four inputs of each output side by side, around 128, then the outputs' steps. Padded with zeros (128)."""
    (K, N), steps = weight.shape, np.asarray(steps)
    blocks, panels = len(steps), -(-N // PANEL)
    whole = np.zeros((blocks * BLOCK, panels * PANEL), np.int8)
    whole[:K, :N] = weight
    fours = whole.reshape(blocks, BLOCK // 4, 4, panels, PANEL).transpose(3, 0, 1, 4, 2)
    values = (fours.astype(np.int16) + ZERO_POINT).astype(np.uint8).reshape(panels, blocks, -1)
    padded = np.zeros((blocks, panels * PANEL), np.float32)
    padded[:, :N] = steps
    scales = np.ascontiguousarray(padded.reshape(blocks, panels, PANEL).transpose(1, 0, 2)).view(np.uint8)
    return np.concatenate([values, scales], axis=2)
