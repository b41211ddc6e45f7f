"""ONNX Runtime's form of the markov graph: what draws and matches is left out of a pass in which no request does either.

Knows: the graph that export/heads.py builds. Refuses to know: what a draw is.
Six nodes in seven serve requests that draw; with none of them they compute nothing, but each node costs 2 us of a round.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import NodeProto, helper

from .graph import DTYPES, Graph
from .lower_native import lower_greedy_slots

RANDOM = ("sample_index", "match_index")


def lower_idle_draws(g: Graph) -> None:
    """Rewrites the markov graph `g` of a draft that keeps no caches: If(requests draw or match, all nodes, those for the
    argmax alone). Weights stay in the graph around both branches, which share them."""
    if g.name != "markov" or any(spec.name.startswith("past_key_values.") for spec in g.inputs):
        return
    first, second = (g.op("Shape", name) for name in RANDOM)
    some = g.op("Greater", g.op("Add", first, second), g.const([0]))
    count = 4  # the nodes just added
    every, condition = g.nodes[:-count], g.nodes[-count:]
    names = [spec.name for spec in g.outputs]
    probs = next(spec for spec in g.outputs if spec.name == "draft_probs")
    none = g.weight("no_draft_probs", np.zeros((0, *probs.shape[1:]), np.float32))
    idle = lower_greedy_slots(g, without_draws(every, names, none))
    branches = {
        "then_branch": branch(g, "drawn", every, {name: f"{name}/drawn" for name in names}),
        "else_branch": branch(g, "idle", idle, {name: f"{name}/idle" for name in names}),
    }
    g.nodes = [*condition, helper.make_node("If", [some], names, name="draws/If", **branches)]


def without_draws(nodes: list[NodeProto], outputs: list[str], no_probs: str) -> list[NodeProto]:
    """The nodes that `outputs` need when no request draws: a scatter of no rows changes nothing, and draft_probs is the
    empty weight `no_probs`."""
    same = {node.output[0]: node.input[0] for node in nodes if node.op_type == "ScatterElements"}
    kept, wanted = [], set(outputs)
    for node in reversed(nodes):
        if node.op_type == "ScatterElements" or not wanted & set(node.output):
            continue
        if node.output[0] == "draft_probs":
            node = helper.make_node("Identity", [no_probs], ["draft_probs"], name="draft_probs/Identity")
        node = renamed(node, {name: resolved(name, same) for name in node.input})
        kept.append(node)
        wanted |= set(node.input)
    return kept[::-1]


def resolved(name: str, same: dict[str, str]) -> str:
    while name in same:
        name = same[name]
    return name


def branch(g: Graph, name: str, nodes: Iterable[NodeProto], names: dict[str, str]):
    """A subgraph whose outputs are g's, under the names that `names` gives them: a branch may not share the If's own."""
    outputs = [helper.make_tensor_value_info(names[s.name], DTYPES[s.dtype], s.shape) for s in g.outputs]
    return helper.make_graph([renamed(node, names) for node in nodes], name, [], outputs)


def renamed(node: NodeProto, names: dict[str, str]) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    for field in (copy.input, copy.output):
        field[:] = [names.get(name, name) for name in field]
    return copy
