"""The int8 pass: its error, its independence of the other rows, outliers, and rows of zeros, in both forms."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from export.graph import Graph
from export.lower_onnxruntime import lower
from export.quantize import BLOCK, quantize, quantize_blocks, quantize_columns

K, N = 96, 40  # K is no multiple of BLOCK: the last block is half empty
LOWERED = {"row": "MatMulIntegerToFloat", "block": "MatMulNBits"}


@pytest.fixture(params=[("row", False), ("row", True), ("block", False), ("block", True)], ids=lambda p: f"{p[0]}-{'lowered' if p[1] else 'standard'}")
def matmul(request, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((K, N), dtype=np.float32)
    weight[:, 3] = 0
    g = Graph("q")
    form, lowered = request.param
    g.quantizable[g.weight("w", weight, ("w.source",))] = form
    g.op("MatMul", g.input("x", "float32", ("M", K)), "w", out="y")
    g.output("y", "float32", ("M", N))
    quantize(g)
    if lowered:
        lower(g)
    assert [n.op_type for n in g.nodes].count(LOWERED[form]) == lowered
    assert g.used_sources() == {"w.source"} and "w" not in g.weights
    g.save(tmp_path)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    return form, weight, lambda x: session.run(None, {"x": x})[0]


def dequantized(weight: np.ndarray) -> np.ndarray:
    q, scale = quantize_blocks(weight)
    return q * np.repeat(scale, BLOCK, axis=0)[: len(weight)]


def test_close_to_float32(matmul):
    form, weight, run = matmul
    x = np.random.default_rng(1).standard_normal((16, K), dtype=np.float32)
    got = run(x)
    q, scale = quantize_columns(weight)
    want = x @ (q * scale if form == "row" else dequantized(weight))
    assert np.abs(got - want).max() / np.abs(want).max() < 0.02
    assert np.corrcoef(got.ravel(), (x @ weight).ravel())[0, 1] > 0.9995 and not got[:, 3].any()


def test_a_block_keeps_an_outlier_channel_to_itself(matmul):
    """One huge channel makes the step of a whole row coarse; in the block form that of its own block only."""
    form, weight, run = matmul
    x = np.random.default_rng(1).standard_normal((4, K), dtype=np.float32)
    x[:, 5] = 300
    weight[:BLOCK] = 0
    elsewhere = run(x) - run(np.where(np.arange(K) < BLOCK, x, 0).astype(np.float32))  # what the second block contributes
    error = np.abs(elsewhere - x @ weight).max()
    assert error > 1 if form == "row" else error < 0.2


@pytest.mark.parametrize("rows", [2, 7, 33])
def test_a_row_does_not_feel_its_neighbours(matmul, rows):
    _, _, run = matmul
    x = np.random.default_rng(2).standard_normal((rows, K), dtype=np.float32)
    x[rows // 2] *= 1000  # under one scale a tensor this row would erase the others
    together = run(x)
    for i in range(len(x)):
        np.testing.assert_array_equal(run(x[i : i + 1])[0], together[i])


def test_a_row_of_zeros_gives_zeros(matmul):
    _, _, run = matmul
    np.testing.assert_array_equal(run(np.zeros((2, K), np.float32)), np.zeros((2, N)))


def test_columns_use_the_whole_range():
    weight = np.random.default_rng(3).standard_normal((K, N), dtype=np.float32)
    q, scale = quantize_columns(weight)
    assert q.dtype == np.int8 and (np.abs(q).max(axis=0) == 127).all()
    np.testing.assert_allclose(q * scale, weight, atol=scale.max() * 0.51)


def test_blocks_are_scaled_one_by_one():
    weight = np.random.default_rng(3).standard_normal((K, N), dtype=np.float32)
    weight[BLOCK:] *= 100
    q, scale = quantize_blocks(weight)
    assert q.shape == weight.shape and scale.shape == (2, N)
    assert np.abs(dequantized(weight) - weight)[:BLOCK].max() < 0.02 < np.abs(dequantized(weight) - weight)[BLOCK:].max()
