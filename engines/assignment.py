"""Which nodes of a graph ONNX Runtime gave to which provider, and whether a decode round can live with it.

Knows: what ONNX Runtime records of its partitioning. Refuses to know: sessions, bundles, CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

RECORD = ("session.record_ep_graph_assignment_info", "1")  # a session's option: nothing is recorded without it

# What a GPU provider itself leaves to the CPU although it could compute it: sizes, and arithmetic on a few indices that
# come from the host. It costs no copy from the GPU. Anything else on the CPU makes every pass wait for one.
INDEX_OPS = frozenset(
    "Add Cast Concat Div Equal Expand Gather Less Max Min Mod Mul Range Reshape Shape Slice Squeeze Sub Unsqueeze"
    " Where".split()
)


@dataclass(frozen=True)
class Node:
    """One node of a graph: its name, operator and the provider that runs it."""

    name: str
    op: str
    provider: str


def nodes_of(subgraphs: Iterable) -> tuple[Node, ...]:
    """From `InferenceSession.get_provider_graph_assignment_info()`."""
    return tuple(Node(n.name, n.op_type, part.ep_name) for part in subgraphs for n in part.get_nodes())


def elsewhere(nodes: Iterable[Node], provider: str) -> tuple[Node, ...]:
    """The nodes that `provider` does not run."""
    return tuple(node for node in nodes if node.provider != provider)


def refused(nodes: Iterable[Node], provider: str) -> tuple[Node, ...]:
    """Those of them that a decode round cannot live with: they compute on values that lie on the GPU."""
    return tuple(node for node in elsewhere(nodes, provider) if node.op not in INDEX_OPS)


def sentence(graph: str, nodes: tuple[Node, ...], provider: str) -> str | None:
    """What is wrong with `graph`, and how to mend it; None when nothing is."""
    wrong = refused(nodes, provider)
    if not wrong:
        return None
    first, more = wrong[0], f" (and {len(wrong) - 1} more nodes)" if len(wrong) > 1 else ""
    integers = any(node.op.startswith(("MatMulInteger", "DynamicQuantize")) for node in wrong)
    mend = "export with --dtype fp32, int8's products have no GPU kernel" if integers else "run it with --device cpu"
    return f"{graph}: node {first.name} ({first.op}){more} runs on {first.provider}, not on {provider}; {mend}."
