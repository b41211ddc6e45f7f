"""A session of one written graph: what it refuses, and caches that stay where they are bound."""

from __future__ import annotations

import numpy as np
import pytest

from export.graph import Graph, TensorSpec
from export.runner import Runner


def adder(tmp_path) -> Graph:
    """present = past + x, total = their sum."""
    g = Graph("adder")
    x, past = g.input("x", "float32", ("R", "C")), g.input("past_key_values.0.key", "float32", ("R", "C"))
    g.op("Add", x, past, out="present.0.key")
    g.op("ReduceSum", "present.0.key", keepdims=0, out="total")
    g.output("present.0.key", "float32", ("R", "C"))
    g.output("total", "float32", ())
    g.save(tmp_path)
    return g


def test_caches_keep_what_a_call_wrote(tmp_path):
    run = Runner(tmp_path, adder(tmp_path), rows=2, length=3)
    totals = [float(run(x=np.ones((2, 3)))["total"]) for _ in range(3)]
    assert totals == [6.0, 12.0, 18.0]
    assert run.caches["past_key_values.0.key"].numpy().tolist() == [[3.0] * 3] * 2


def test_only_outputs_that_are_no_caches_come_back(tmp_path):
    assert list(Runner(tmp_path, adder(tmp_path), 2, 3)(x=np.zeros((2, 3)))) == ["total"]


def test_a_graph_that_is_not_as_declared_is_refused(tmp_path):
    graph = adder(tmp_path)
    graph.inputs[0] = TensorSpec("x", "float32", ("R", 5))
    with pytest.raises(ValueError, match="graph adder: its inputs are not as declared"):
        Runner(tmp_path, graph, 2, 3)
