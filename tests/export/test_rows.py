"""Long rows: the inverse CDF against float64, the argmax against numpy, and that a row's bits do not depend on its place."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from export.graph import Graph
from export.rows import SHORT_ROW, argmax, inverse_cdf, row_total

SIZES = [7, SHORT_ROW, 2 * SHORT_ROW, 4099, 49152]


def session(folder, function, size: int, dtype: str, *inputs: tuple[str, tuple]):
    g = Graph("rows")
    g.op("Identity", function(g, *(g.input(n, "float32", s) for n, s in inputs), size), out="y")
    g.output("y", dtype, ("R", 1))
    g.save(folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("size", SIZES)
def test_argmax_is_the_first_of_the_largest(tmp_path, size):
    run = session(tmp_path, argmax, size, "int64", ("x", ("R", size)))
    rng = np.random.default_rng(0)
    x = rng.integers(0, 40, (60, size)).astype(np.float32)  # many ties
    x[0], x[1], x[2] = -1e30, 0, np.arange(size)
    np.testing.assert_array_equal(run.run(None, {"x": x})[0][:, 0], x.argmax(-1))
    assert run.run(None, {"x": x[:0]})[0].shape == (0, 1)


@pytest.mark.parametrize("size", SIZES)
def test_a_rows_sum_has_the_same_bits_alone_and_in_any_batch(tmp_path, size):
    """A plain ReduceSum fails this for a size that is no multiple of the vector width."""
    run = session(tmp_path, row_total, size, "float32", ("x", ("R", size)))
    x = np.random.default_rng(0).random((9, size), dtype=np.float32)
    whole = run.run(None, {"x": x})[0]
    np.testing.assert_allclose(whole[:, 0], x.sum(-1, dtype=np.float64), rtol=1e-5)
    for first in range(9):
        np.testing.assert_array_equal(run.run(None, {"x": x[first : first + 1].copy()})[0], whole[first : first + 1])
        np.testing.assert_array_equal(run.run(None, {"x": x[first:].copy()})[0], whole[first:])


@pytest.mark.parametrize("size", SIZES)
def test_inverse_cdf_is_exact_at_any_size(tmp_path, size):
    """Against a float64 running sum; a float32 one over 49152 weights is wrong in 4% of the draws."""
    run = session(tmp_path, inverse_cdf, size, "int64", ("w", ("R", size)), ("u", ("R", 1)))
    rng = np.random.default_rng(0)
    w = np.exp(3 * rng.standard_normal((200, size), dtype=np.float32))
    w[:, ::3] = 0
    u = (rng.integers(0, 2**23, (200, 1)) / 2**23).astype(np.float32)
    u[0], u[1] = 0, 1 - 2.0**-23
    index = run.run(None, {"w": w, "u": u})[0]
    cdf = w.astype(np.float64).cumsum(-1)
    want = (cdf <= u * cdf[:, -1:]).sum(-1, keepdims=True)
    assert (index == want).mean() >= 0.98
    assert (np.take_along_axis(w, index, 1) > 0).all()
    assert run.run(None, {"w": w[:0], "u": u[:0]})[0].shape == (0, 1)
