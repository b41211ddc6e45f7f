"""The int8 pass: its error, its independence of the other rows, and rows of zeros."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from export.graph import Graph
from export.lower_onnxruntime import lower
from export.quantize import quantize, quantize_columns

K, N = 96, 40


@pytest.fixture(params=[(1, False), (1, True), (2, True)], ids=["standard ops", "lowered", "two terms"])
def matmul(request, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((K, N), dtype=np.float32)
    weight[:, 3] = 0
    g = Graph("q")
    terms, lowered = request.param
    g.quantizable[g.weight("w", weight, ("w.source",))] = terms
    g.op("MatMul", g.input("x", "float32", ("M", K)), "w", out="y")
    g.output("y", "float32", ("M", N))
    quantize(g)
    if lowered:
        lower(g)
    assert [n.op_type for n in g.nodes].count("MatMulIntegerToFloat") == lowered * terms
    assert g.used_sources() == {"w.source"} and "w" not in g.weights
    g.save(tmp_path)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    return terms, weight, lambda x: session.run(None, {"x": x})[0]


def test_close_to_float32(matmul):
    terms, weight, run = matmul
    x = np.random.default_rng(1).standard_normal((16, K), dtype=np.float32)
    got = run(x)
    q, scale = quantize_columns(weight)
    want = x @ (q * scale)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < (0.02 if terms == 1 else 1e-4)
    assert np.corrcoef(got.ravel(), (x @ weight).ravel())[0, 1] > 0.9995 and not got[:, 3].any()


def test_two_terms_survive_an_outlier_channel(matmul):
    """One huge channel makes the step coarse for all others; the second term brings them back."""
    terms, weight, run = matmul
    x = np.random.default_rng(1).standard_normal((4, K), dtype=np.float32)
    x[:, 5] = 300
    q, scale = quantize_columns(weight)
    error = np.abs(run(x) - x @ (q * scale)).max()
    assert error > 1 if terms == 1 else error < 0.1


def test_a_row_does_not_feel_its_neighbours(matmul):
    _, _, run = matmul
    x = np.random.default_rng(2).standard_normal((7, K), dtype=np.float32)
    x[4] *= 1000  # under one scale a tensor this row would erase the others
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
