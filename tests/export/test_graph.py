"""The builder: constants are shared, dead nodes go, large weights lie outside the protobuf."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export.graph import Graph


def small_graph(size: int) -> Graph:
    g = Graph("small")
    x = g.input("x", "float32", ("N", size))
    w = g.weight("w", np.arange(size * 8, dtype=np.float32).reshape(8, size).T, ("w.source",))
    g.op("MatMul", x, w, out="y")
    g.op("MatMul", x, g.weight("dead", np.ones((size, 2), np.float32), ("dead.source",)))
    g.output("y", "float32", ("N", 8))
    return g


def test_prune_drops_what_reaches_no_output():
    g = small_graph(4)
    g.prune()
    assert [n.op_type for n in g.nodes] == ["MatMul"] and g.used_sources() == {"w.source"}


@pytest.mark.parametrize("size, external", [(4, False), (1024, True)])
def test_saved_graph_runs(tmp_path, size, external):
    g = small_graph(size)
    g.save(tmp_path)
    assert (tmp_path / "model.onnx.data").is_file() == external
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 24
    x = np.random.default_rng(0).standard_normal((3, size), dtype=np.float32)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ g.weights["w"], rtol=1e-4)


def test_equal_constants_are_one():
    g = Graph("constants")
    assert g.const([1]) == g.const([1]) != g.const([1], "float32")
    assert g.weights[g.const(3)].shape == ()


def test_a_name_is_used_once():
    g = small_graph(4)
    with pytest.raises(ValueError, match="already has an initializer w"):
        g.weight("w", np.zeros(1, np.float32))
