"""The account of a bundle: every input has a reader, every checkpoint tensor lies in exactly the graphs that need it.

Knows: which engine owns which tensor names. Refuses to know: values (parity.py compares those).
"""

from __future__ import annotations

from training.draft import DraftModel
from training.target import TargetModel

from .graph import Graph

OWNERS = (  # prefix of a draft tensor's name -> the graphs that must hold it
    ("fc.", ("backbone",)),
    ("markov_head.", ("markov",)),
    ("confidence_head.", ("confidence",)),
    ("d2t", ("markov", "verify")),
    ("", ("backbone",)),
)


def check_graphs(graphs: list[Graph], target: TargetModel, draft: DraftModel) -> None:
    """Raises ValueError naming the first input without a reader, or the first tensor missing or in the wrong graph."""
    held = {g.name: g.used_sources() for g in graphs}
    for g in graphs:
        readers = g.consumers()
        if idle := [spec.name for spec in g.inputs if spec.name not in readers]:
            raise ValueError(f"graph {g.name}: input {idle[0]} has no consumer.")
        made = {name for node in g.nodes for name in node.output}
        if lost := [spec.name for spec in g.outputs if spec.name not in made]:
            raise ValueError(f"graph {g.name}: output {lost[0]} is made by no node.")
    expected: dict[str, set[str]] = {name: set() for name in held}
    expected["target"] = set(target.state_dict())
    steps = ("markov",) if draft.config.kind != "parallel" and draft.config.block_size > 1 else ()
    for tensor in draft.state_dict():
        prefix, owners = next(pair for pair in OWNERS if tensor.startswith(pair[0]))
        for owner in (*owners, *(() if prefix else steps)):  # an autoregressive draft's layers run in its steps too
            expected[owner].add(tensor)
    for name, want in expected.items():
        if missing := sorted(want - held[name]):
            raise ValueError(f"graph {name}: checkpoint tensor {missing[0]} is not in it ({len(missing)} missing).")
        if foreign := sorted(held[name] - want):
            raise ValueError(f"graph {name}: it holds checkpoint tensor {foreign[0]}, which is not its own.")
