"""8-bit weights behind a DequantizeLinear: exact scales, the error of a rounding, one form in the graph, and a plan."""

from __future__ import annotations

import io

import numpy as np
import onnxruntime as ort
import pytest
from rich.console import Console

from engines.trt.api import load_api
from engines.trt.build import compile_graph
from engines.trt.profiles import Profile
from export.__main__ import build_graphs, runnable
from export.bundle import load_models
from export.graph import Graph
from export.parity import check_parity
from export.precision import emulated, to_half
from export.weight_only import rounded, weights_only
from tests.engines.trt.graphs import LIMITS, MAX_CONTEXT, job
from tests.tiny import make_draft, make_target

K, N = 96, 40
QUIET = Console(file=io.StringIO())


def weight() -> np.ndarray:
    array = np.random.default_rng(0).standard_normal((K, N), dtype=np.float32) * np.logspace(-6, 2, N, dtype=np.float32)
    array[:, 3] = 0
    return array


def linear() -> Graph:
    g = Graph("linear")
    g.quantizable[g.weight("w", weight(), ("w.source",))] = "row"
    g.op("MatMul", g.input("x", "float32", ("M", K)), "w", out="y")
    g.output("y", "float32", ("M", N))
    return g


def test_scales_are_float16_and_no_weight_is_cut_off():
    array = weight()
    q, scale = rounded(array)
    assert q.dtype == np.int8 and scale.dtype == np.float32 and np.abs(q).max() == 127
    np.testing.assert_array_equal(scale.astype(np.float16).astype(np.float32), scale)
    assert (np.abs(array - q * scale) <= scale / 2 * 1.0001).all() and not q[:, 3].any()
    assert np.abs(q[:, 10:]).max(axis=0).min() >= 126  # the range is used where float16 has enough digits for the scale


@pytest.mark.parametrize("emulate", [False, True], ids=["as it is", "emulated"])
def test_the_product_is_that_of_the_rounded_weights(tmp_path, emulate):
    g = linear()
    weights_only(g)
    to_half(g, "w8a16")
    g = emulated(g, "w8a16") if emulate else g
    kinds = {a.dtype.name for a in g.weights.values()}
    assert g.used_sources() == {"w.source"} and kinds == {"int8", "float32" if emulate else "float16"}
    g.save(tmp_path)
    x = np.random.default_rng(1).standard_normal((5, K), dtype=np.float32)
    options = ort.SessionOptions()
    if not emulate:  # ONNX Runtime would make it a kernel of its own, with 8-bit activations
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": x})[0]
    q, scale = rounded(weight())
    half = lambda a: a.astype(np.float16).astype(np.float32)
    want = half(x) @ half(q * scale)
    assert (np.abs(got - want) <= 2e-3 * np.abs(want).max(axis=0) + 1e-6).all()  # a column at a time: they differ by 1e8
    assert np.corrcoef(got[:, 20:].ravel(), (x @ weight())[:, 20:].ravel())[0, 1] > 0.999


@pytest.fixture()
def graphs(tmp_path):
    target = make_target(tmp_path / "target", family="qwen3", head_dim=16, layers=2)
    models = load_models(target, make_draft(tmp_path / "draft", target, head="rnn"), MAX_CONTEXT)[:2]
    return target, models, build_graphs(*models, dtype="w8a16", max_context=MAX_CONTEXT, static_cache=LIMITS.cache)


def test_every_big_weight_is_int8_and_fc_is_not(graphs):
    for g in graphs[2]:
        made_by = {node.output[0]: node for node in g.nodes}
        for node in g.nodes:
            if node.op_type != "MatMul":
                continue
            dequantized = made_by.get(node.input[1])
            left = node.input[1].startswith(("fc.", "confidence_head.", "markov_head."))
            assert (dequantized is None) == left, node.input[1]
            if dequantized is not None:
                assert dequantized.op_type == "DequantizeLinear"
                assert [g.weights[name].dtype.name for name in dequantized.input] == ["int8", "float16"]
    dequantized = [node for node in graphs[2][0].nodes if node.op_type == "DequantizeLinear"]
    assert len(dequantized) == 2 * 4 + 1  # qkv, o, gate_up, down of two layers; lm_head


def test_it_agrees_with_pytorch_and_a_dropped_layer_does_not(tmp_path, graphs):
    folder, models, made = graphs

    def parity() -> list[dict]:
        for graph in made:
            graph.save(tmp_path / "onnx" / graph.name)
        with runnable(tmp_path, made, "w8a16") as (at, runnables):
            return check_parity(at, runnables, *models, folder, dtype="w8a16", console=QUIET)

    worst = min(row["cosine"] for row in parity() if row["engine"] == "target")
    assert worst < 0.999_999, "nothing was rounded to 8 bits"
    name = next(n for n in made[0].weights if n.startswith("layers.1.mlp.down_proj") and n.endswith(".int8"))
    made[0].weights[name] = np.zeros_like(made[0].weights[name])
    with pytest.raises(ValueError, match="^parity: target, .* is outside the w8a16 gate"):
        parity()


def test_tensorrt_compiles_it_with_fused_attention_and_8_bit_weights(tmp_path, graphs):
    """The product and the dequantisation are one kernel, so that the plan holds 8 bits a weight."""
    api, made = load_api("tensorrt-rtx"), graphs[2]
    for graph in made[:2]:
        graph.save(tmp_path / graph.name)
        plan = compile_graph(api, job(tmp_path, graph))
        widened = [k for k in plan.kernels if any("DequantizeLinear" in node for node in k.nodes)]
        assert widened and all(any("MatMul" in node for node in k.nodes) for k in widened)
        assert plan.unfused == () and len(plan.attentions) == sum("past" in s.name for s in graph.inputs) // 2
    g = Graph("wide")
    array = np.random.default_rng(0).standard_normal((512, 1024), dtype=np.float32)
    g.quantizable[g.weight("w", array, ("w",))] = "row"
    g.op("MatMul", g.input("x", "float32", ("R", 512)), "w", out="y")
    g.output("y", "float32", ("R", 1024))
    weights_only(g)
    to_half(g, "w8a16")
    g.save(tmp_path / "wide")
    plan = compile_graph(api, job(tmp_path, g, profiles=(Profile("only", {"R": (8, 8, 8)}, {}),)))
    assert 512 * 1024 <= plan.memory["weights"] < 1.2 * 512 * 1024
