"""Products by the CPU kernels: the arithmetic, bit for bit; that no row feels its neighbours; what a graph becomes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from export.graph import Graph
from export.lower_native import PANEL, pack_panels
from export.lower_onnxruntime import lower
from export.quantize import BLOCK, quantize, quantize_blocks
from export.target import build_target
from tests.kernels import kernels, runner_of
from tests.tiny import make_target
from training.target import TargetModel

SIZES = [(64, 32), (96, 40), (200, 70), (576, 96), (32, 5)]  # whole and cut blocks, whole and cut panels
SHAPES = {"plain": 1, "gated": 2, "normed": 1}  # of x, in K


def graph_of(form: str, K: int, N: int, weight: np.ndarray) -> Graph:
    g = Graph("q")
    x = g.input("x", "float32", ("M", SHAPES[form] * K))
    if form == "gated":
        gate, up = g.op("Split", x, out=2, axis=-1, num_outputs=2)
        x = g.op("Mul", g.op("Swish", gate), up)
    if form == "normed":
        x = g.op("Add", x, g.input("skip", "float32", ("M", K)), out="sum")
        x = g.op("RMSNormalization", x, g.weight("norm", np.linspace(0.5, 2, K).astype(np.float32)), axis=-1, epsilon=1e-5)
        g.output("sum", "float32", ("M", K))
    g.quantizable[g.weight("w", weight, ("w.source",))] = "row"
    g.op("MatMul", x, "w", out="y")
    g.output("y", "float32", ("M", N))
    quantize(g, blocks=True)
    lower(g, native=True)
    return g


def feeds_of(form: str, M: int, K: int, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((M, SHAPES[form] * K), dtype=np.float32)
    return {"x": x, "skip": rng.standard_normal((M, K), dtype=np.float32)} if form == "normed" else {"x": x}


def rows_of(form: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What the product's rows are, in float64."""
    x = feeds["x"].astype(np.float64)
    if form == "gated":
        gate, up = np.split(x, 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up
    if form == "normed":
        x = x + feeds["skip"]
        return x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * np.linspace(0.5, 2, x.shape[1])
    return x


def expected(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product of rows and weights as blocks of 8-bit numbers give it, in float64."""
    q, scale = quantize_blocks(weight)
    y = np.zeros((len(rows), weight.shape[1]))
    for b in range(len(scale)):
        part = slice(b * BLOCK, (b + 1) * BLOCK)
        top = np.abs(rows[:, part]).max(1, keepdims=True)
        a = np.rint(rows[:, part] * np.divide(127, top, out=np.zeros_like(top), where=top > 0))
        y += (a @ q[part].astype(np.float64)) * (top / 127) * scale[b]
    return y


@pytest.mark.parametrize("K, N", SIZES)
@pytest.mark.parametrize("form", SHAPES)
def test_the_product_is_that_of_8_bit_blocks(tmp_path, form, K, N):
    weight = np.random.default_rng(0).standard_normal((K, N), dtype=np.float32)
    weight[:, 3], weight[: min(K, BLOCK), 1] = 0, 0
    graph = graph_of(form, K, N, weight)
    names = {"plain": ["BlockMatMul"], "gated": ["BlockMatMul"], "normed": ["NormMatMul"]}[form]
    assert [node.op_type for node in graph.nodes] == names and graph.used_sources() == {"w.source"}
    graph.save(tmp_path)
    runner, feeds = runner_of(tmp_path, graph), feeds_of(form, 21, K)
    got, rows = runner(**feeds), rows_of(form, feeds)
    want = expected(rows, weight)
    steps = 0 if form == "plain" else 2  # an activation halfway between two steps may be rounded either way
    assert np.abs(got["y"] - want).max() <= 1e-5 * np.abs(want).max() + steps * np.abs(rows).max() / 127 * np.abs(weight).max()
    assert np.corrcoef(got["y"].ravel(), (rows @ weight).ravel())[0, 1] > 0.9995 and not got["y"][:, 3].any()
    if form == "normed":
        np.testing.assert_array_equal(got["sum"], feeds["x"] + feeds["skip"])


@pytest.mark.parametrize("form", SHAPES)
def test_a_row_has_the_same_bits_in_any_batch(tmp_path, form):
    K, N = 200, 70
    graph = graph_of(form, K, N, np.random.default_rng(0).standard_normal((K, N), dtype=np.float32))
    graph.save(tmp_path)
    runner, feeds = runner_of(tmp_path, graph), feeds_of(form, 40, K)
    alone = np.concatenate([runner(**{n: x[i : i + 1] for n, x in feeds.items()})["y"] for i in range(40)])
    for M in (*range(2, 20), 40):  # tiles of one to eight rows, and where rows are quantised by all threads
        np.testing.assert_array_equal(runner(**{n: x[:M] for n, x in feeds.items()})["y"], alone[:M])


def test_rows_of_zeros_none_and_huge_ones(tmp_path):
    graph = graph_of("plain", 96, 40, np.random.default_rng(0).standard_normal((96, 40), dtype=np.float32))
    graph.inputs = [replace(graph.inputs[0], shape=("M", "W"))]
    graph.save(tmp_path)
    runner = runner_of(tmp_path, graph)
    assert runner(x=np.zeros((0, 96), np.float32))["y"].shape == (0, 40)
    x = feeds_of("plain", 3, 96)["x"]
    x[1] = 0
    y = runner(x=x)["y"]
    assert not y[1].any()
    np.testing.assert_allclose(runner(x=x * np.float32(1e30))["y"], y * np.float32(1e30), rtol=1e-5)
    with pytest.raises(Exception, match="BlockMatMul: the last dimension of x is 95; it must be 96."):
        runner.session.run(None, {"x": np.zeros((1, 95), np.float32)})


SCRIPT = """
import sys, numpy as np, onnxruntime as ort
from pathlib import Path
from engines.native import register
options = ort.SessionOptions()
register(options, Path(sys.argv[1]))
session = ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
np.save(sys.argv[4], session.run(None, {"x": np.load(sys.argv[3])})[0])
"""


def test_both_instruction_sets_give_the_same_bits(tmp_path):
    """Integers are exact and the float32 sums in one order; on a CPU without AVX-512 VNNI the two are one."""
    graph = graph_of("plain", 200, 70, np.random.default_rng(0).standard_normal((200, 70), dtype=np.float32))
    graph.save(tmp_path)
    np.save(tmp_path / "x.npy", feeds_of("plain", 21, 200)["x"])
    results = []
    for wide in (True, False):
        out = tmp_path / f"{wide}.npy"
        env = os.environ | ({} if wide else {"DSPARK_KERNELS_AVX2": "1"})
        files = (kernels(), tmp_path / "model.onnx", tmp_path / "x.npy", out)
        subprocess.run([sys.executable, "-c", SCRIPT, *map(str, files)], env=env, check=True)
        results.append(np.load(out))
    np.testing.assert_array_equal(*results)


def test_panels_hold_four_inputs_of_each_output_side_by_side():
    K, N = 96, 40
    weight = np.random.default_rng(0).integers(-127, 128, (K, N)).astype(np.int8)
    steps = np.random.default_rng(1).random((2, N), dtype=np.float32)
    packed = pack_panels(weight, steps)
    assert packed.shape == (2, 2, BLOCK * PANEL + 4 * PANEL) and packed.dtype == np.uint8
    value = lambda k, n: packed[n // PANEL, k // BLOCK, (k % BLOCK // 4 * PANEL + n % PANEL) * 4 + k % 4] - 128
    for k, n in [(0, 0), (3, 31), (64, 32), (95, 39), (63, 5)]:
        assert value(k, n).astype(np.int8) == weight[k, n]
    assert packed[1, 1, BLOCK // 2 * PANEL : BLOCK * PANEL].max() == 128  # inputs that are not there
    tail = packed[1, 1, BLOCK * PANEL :].view(np.float32)
    np.testing.assert_array_equal(tail, [*steps[1, PANEL:], *np.zeros(2 * PANEL - N)])


def test_a_layer_of_a_target_is_five_operators(tmp_path):
    model = TargetModel.from_pretrained(make_target(tmp_path / "target", head_dim=32), (0,))
    graph = build_target(model, 64, native=True)
    quantize(graph, blocks=True)
    lower(graph, native=True)
    ops = Counter(node.op_type for node in graph.nodes)
    assert ops["CachedAttention"] == 3 and ops["NormMatMul"] == 5  # the first norm has no residual before it
    assert ops["BlockMatMul"] == 3 * 2 + 1 + 1 and not ops["QuickGelu"] and not ops["Split"]
    assert graph.used_sources() == set(model.state_dict())


def test_a_norm_that_two_products_read_stays(tmp_path):
    g = Graph("q")
    x = g.op("Add", g.input("x", "float32", ("M", 64)), g.input("skip", "float32", ("M", 64)))
    h = g.op("RMSNormalization", x, g.weight("norm", np.ones(64, np.float32)), axis=-1, epsilon=1e-5)
    for name in "ab":
        g.quantizable[g.weight(name, np.eye(64, dtype=np.float32), (name,))] = "row"
        g.op("MatMul", h, name, out=f"y.{name}")
        g.output(f"y.{name}", "float32", ("M", 64))
    quantize(g, blocks=True)
    lower(g, native=True)
    assert Counter(node.op_type for node in g.nodes) == {"SkipSimplifiedLayerNormalization": 1, "BlockMatMul": 2}
