"""docs/tensorrt.md's commands for a graph that does not compile, on a small one with a node that TensorRT-RTX refuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

DOCS = Path(__file__).parents[3] / "docs" / "tensorrt.md"
COMMANDS = re.findall(r"^    (polygraphy .*)$", DOCS.read_text(), re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """GRAPH.onnx: project, relu, draw (Multinomial, which is refused), cast."""
    folder = tmp_path_factory.mktemp("polygraphy")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="project"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Multinomial", ["b"], ["c"], name="draw", sample_size=1, dtype=TensorProto.INT32),
        helper.make_node("Cast", ["c"], ["y"], name="cast", to=TensorProto.FLOAT),
    ]
    value = lambda name, size: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size])
    weights = [numpy_helper.from_array(np.ones((8, 4), np.float32), "w")]
    graph = helper.make_graph(nodes, "graph", [value("x", 8)], [value("y", 1)], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, folder / "GRAPH.onnx")
    return folder


def polygraphy(folder: Path, which: str) -> str:
    """The output of the documented command that begins so."""
    (line,) = [command for command in COMMANDS if command.startswith(f"polygraphy {which}")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run(
        shlex.split(line), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def test_the_page_names_three_commands():
    assert len(COMMANDS) == 3 and "export POLYGRAPHY_USE_TENSORRT_RTX=1" in DOCS.read_text()


def test_inspect_shows_every_node(folder):
    shown = polygraphy(folder, "inspect model")
    assert all(f"{name} [Op: {op}]" in shown for name, op in (("project", "MatMul"), ("draw", "Multinomial")))


def test_capability_names_the_refused_node(folder):
    summary = polygraphy(folder, "inspect capability").split("Summary")[1]
    assert "Multinomial" in summary and "draw" in summary and "MatMul" not in summary


def test_reduce_leaves_the_refused_node_alone(folder):
    polygraphy(folder, "debug reduce")
    assert [node.name for node in onnx.load(folder / "reduced.onnx").graph.node] == ["draw"]
