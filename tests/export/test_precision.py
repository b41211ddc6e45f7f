"""The half-precision pass: what becomes half, what stays float32, and that a graph in half precision is still the
model."""

from __future__ import annotations

import io

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto
from rich.console import Console

from export.__main__ import build_graphs, runnable
from export.bundle import load_models
from export.graph import Graph
from export.parity import check_parity
from export.precision import emulated, to_half
from export.runner import Runner
from tests.tiny import make_draft, make_target

CONTEXT, CACHE = 128, 192
QUIET = Console(file=io.StringIO())


def half_graphs(folder, dtype="fp16", *, family="qwen3", **draft):
    target = make_target(folder / "target", family=family)
    models = load_models(target, make_draft(folder / "draft", target, **draft), CONTEXT)[:2]
    return target, models, build_graphs(*models, dtype=dtype, max_context=CONTEXT, static_cache=CACHE)


def value_types(g: Graph) -> dict[str, str]:
    """{value: "half" | "float32"} by the rules of ONNX, for the floating-point values whose type the graph fixes."""
    name = {np.dtype(np.float32): "float32", np.dtype(np.float16): "half", np.dtype(ml_dtypes.bfloat16): "half"}
    types = {w: name[a.dtype] for w, a in g.weights.items() if a.dtype in name}
    types |= {s.name: "float32" if s.dtype == "float32" else "half" for s in g.inputs if "float" in s.dtype}
    for node in g.nodes:
        if node.op_type == "Cast":
            kind = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "half", TensorProto.BFLOAT16: "half"}.get(
                node.attribute[0].i
            )
        elif node.op_type in (
            "Shape",
            "TopK",
            "Greater",
            "GreaterOrEqual",
            "Less",
            "LessOrEqual",
            "Equal",
            "And",
            "Or",
            "Not",
        ):
            kind = None if node.op_type != "TopK" else types.get(node.input[0])
        else:
            kinds = {types[name] for name in node.input if name in types}
            assert len(kinds) <= 1, f"{node.name} mixes precisions"
            kind = kinds.pop() if kinds else None
        if kind:
            types[node.output[0]] = kind
            if node.op_type == "Split":
                types |= dict.fromkeys(node.output, kind)
    return types


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_matrix_work_is_half_and_the_rest_is_not(tmp_path, dtype, head):
    for g in half_graphs(tmp_path, dtype, head=head)[2]:
        types = value_types(g)
        for node in g.nodes:
            operands = {types[name] for name in node.input if name in types}
            if node.op_type in ("Attention", "RotaryEmbedding", "TensorScatter"):
                assert operands == {"half"}, node.name
            elif node.op_type == "MatMul":
                full = any(name.startswith(("fc.", "confidence_head.")) for name in node.input)
                assert operands == ({"float32"} if full else {"half"}), node.name
            elif node.op_type in ("RMSNormalization", "Softmax", "Swish", "Sigmoid", "CumSum", "Div", "LogSoftmax"):
                assert operands <= {"float32"}, node.name
            elif node.op_type == "Add" and "float32" in types.get(node.output[0], ""):
                assert operands == {"float32"}  # the residual stream
        halves = ("past_key_values.", "present.", "mask")
        for s in (*g.inputs, *g.outputs):
            if "float" in s.dtype:
                assert (s.dtype != "float32") == s.name.startswith(halves), f"{g.name}: {s.name} is {s.dtype}"
        for s in g.outputs:
            if "float" in s.dtype:
                assert types[s.name] == ("half" if s.name.startswith(halves) else "float32")


def test_no_op_is_of_another_domain(tmp_path):
    """TensorRT reads standard ONNX only."""
    assert {node.domain for g in half_graphs(tmp_path)[2] for node in g.nodes} == {""}


def test_weights_are_stored_in_half_precision_once(tmp_path):
    for g in half_graphs(tmp_path)[2]:
        wide = [name for name, a in g.weights.items() if a.dtype == np.float32 and a.ndim == 2 and a.size > 32]
        assert all(name.startswith(("fc.", "confidence_head.")) for name in wide), wide
    target = half_graphs(tmp_path / "again")[2][0]
    assert len(target.weights) == len({name.removesuffix(".float16") for name in target.weights})


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "family, draft",
    [("llama", {"head": "gated", "draft_vocab": 40}), ("qwen3", {"head": "rnn", "confidence": "hidden"})],
)
def test_half_precision_agrees_with_pytorch(tmp_path, dtype, family, draft):
    """A float32 emulation that rounds where the graph does."""
    folder, models, graphs = half_graphs(tmp_path, dtype, family=family, **draft)
    for graph in graphs:
        graph.save(tmp_path / "onnx" / graph.name)
    with runnable(tmp_path, graphs, dtype) as (at, runnables):
        rows = check_parity(at, runnables, *models, folder, dtype=dtype, console=QUIET)
    worst = min(row["cosine"] for row in rows if row["engine"] == "target")
    assert worst < 1 - 1e-9, "nothing was rounded"
    assert dtype != "bf16" or worst < 0.999_999  # bfloat16 has 8 bits of mantissa, float16 has 11


def test_the_float16_graphs_themselves_agree_with_pytorch(tmp_path):
    """ONNX Runtime takes them as they are (and rounds less than a GPU will)."""
    folder, models, graphs = half_graphs(tmp_path, "fp16", head="rnn")
    for graph in graphs:
        graph.save(tmp_path / "onnx" / graph.name)
    check_parity(tmp_path, graphs, *models, folder, dtype="fp16", console=QUIET)


def transposed(array: np.ndarray) -> np.ndarray:
    """What a forgotten transpose leaves: the numbers in the other order, the shape as it should be."""
    return np.ascontiguousarray(array.T).reshape(array.shape)


def rolled(array: np.ndarray) -> np.ndarray:
    return np.roll(array, 1, axis=0 if array.shape[0] > 1 else 1)


QKV = "layers.0.self_attn.q_proj.k_proj.v_proj.T"
DAMAGE = {  # what is wrong: engine, its weight (up to the suffix of its precision), what becomes of it
    "target, wrong transpose": ("target", "layers.2.self_attn.o_proj.T", transposed),
    "target, heads in another order": ("target", QKV, lambda a: np.roll(a, 8, axis=1)),
    "target, a layer without its MLP": ("target", "layers.1.mlp.down_proj.T", np.zeros_like),
    "target, a layer without attention": ("target", "layers.1.self_attn.o_proj.T", np.zeros_like),
    "backbone, wrong transpose": ("backbone", "layers.0.self_attn.o_proj.T", transposed),
    "backbone, a layer without its MLP": ("backbone", "layers.0.mlp.down_proj.T", np.zeros_like),
    "backbone, features in another order": ("backbone", "fc.T", rolled),
    "markov, wrong transpose": ("markov", "markov_head.markov_w2.weight.T", transposed),
    "markov, no bias of the token before": ("markov", "markov_head.markov_w1.weight", np.zeros_like),
    "confidence, inputs in another order": ("confidence", "confidence_head.proj.T", rolled),
    "verify, draft ids of other tokens": ("verify", "draft_to_target", lambda a: np.roll(a, 1)),
}


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def whole(request, tmp_path_factory):
    """(dtype, target's folder, models, function that gives the graphs anew)."""
    folder = tmp_path_factory.mktemp(request.param)
    target, models, _ = half_graphs(folder, request.param, draft_vocab=40)
    build = lambda: build_graphs(*models, dtype=request.param, max_context=CONTEXT, static_cache=CACHE)
    return request.param, target, models, build


@pytest.mark.parametrize("what", DAMAGE)
def test_the_gates_see_what_is_wrong_in_every_engine(tmp_path, whole, what):
    dtype, folder, models, build = whole
    engine, weight, change = DAMAGE[what]
    graphs = build()
    damaged = next(g for g in graphs if g.name == engine)
    name = next(n for n in damaged.weights if n.removesuffix(".float16").removesuffix(".bfloat16") == weight)
    before, damaged.weights[name] = damaged.weights[name], change(damaged.weights[name])
    assert before.shape == damaged.weights[name].shape and (before != damaged.weights[name]).any()
    for graph in graphs:
        graph.save(tmp_path / "onnx" / graph.name)
    with pytest.raises(ValueError, match=rf"^parity: {engine}, .* is outside the {dtype} gate"):
        with runnable(tmp_path, graphs, dtype) as (at, runnables):
            check_parity(at, runnables, *models, folder, dtype=dtype, console=QUIET)


def linear(weight: np.ndarray) -> Graph:
    g = Graph("linear")
    g.op("MatMul", g.input("x", "float32", ("R", 2)), g.weight("w", weight, ("w",)), out="y")
    g.output("y", "float32", ("R", weight.shape[1]))
    return g


def test_a_weight_outside_the_range_is_one_sentence():
    with pytest.raises(ValueError) as error:
        to_half(linear(np.full((2, 2), 1e5, np.float32)), "fp16")
    assert str(error.value) == "graph linear: weight w holds 1e+05, float16 ends at 6.55e+04; export with --dtype bf16."
    to_half(linear(np.full((2, 2), 1e5, np.float32)), "bf16")


@pytest.mark.parametrize("dtype, bits", [("fp16", 11), ("bf16", 8)])
def test_the_graph_rounds_as_its_type_does(tmp_path, dtype, bits):
    g = linear(np.eye(2, dtype=np.float32))
    to_half(g, dtype)
    g = emulated(g, dtype)
    g.save(tmp_path)
    fine, coarse = 1 + 2.0 ** (1 - bits), 1 + 2.0 ** (-1 - bits)
    (y,) = Runner(tmp_path, g)(x=np.array([[fine, coarse]], np.float32)).values()
    np.testing.assert_array_equal(y, np.array([[fine, 1]], np.float32))
