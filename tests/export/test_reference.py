"""The reference itself, on cases small enough to see the answer (the verify graph is held against it: test_verify.py)."""

from __future__ import annotations

import numpy as np
import pytest

from export.reference import draw_errors, edit, keep, pick_errors, softmax

P = np.array([0.4, 0.3, 0.2, 0.1])


def test_softmax_is_float64_and_sums_to_one():
    p = softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3)]], np.float32))
    assert p.dtype == np.float64
    np.testing.assert_allclose(p, [[0.5, 0.5], [0.25, 0.75]], atol=1e-7)


def test_edit_divides_what_is_positive_and_multiplies_the_rest():
    row = edit(np.array([2.0, -2.0, 5.0]), np.array([0, 1]), np.array([2.0, 2.0]), np.array([0.5, -np.inf]))
    assert row.tolist() == [1.5, -np.inf, 5.0]


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, [1, 1, 1, 1]),
        ({"top_k": 2}, [1, 1, 0, 0]),
        ({"top_p": 0.7}, [1, 1, 0, 0]),
        ({"top_p": 0.71}, [1, 1, 1, 0]),
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),  # 0.4 / 0.7 of what top_k leaves
        ({"min_p": 0.6}, [1, 1, 0, 0]),
    ],
)
def test_filters(options, kept):
    assert keep(P, **options).astype(int).tolist() == kept


def test_ties_stay_together():
    assert keep(np.array([0.4, 0.2, 0.2, 0.2]), top_k=2).all()


def test_large_vocabularies_take_the_same_tokens():
    """Above 256 tokens the mass above each is found by sorting."""
    wide = np.concatenate([P, np.full(300, 1e-9)])
    assert np.flatnonzero(keep(wide, top_p=0.65)).tolist() == [0, 1]


def test_a_draw_outside_its_interval_is_an_error():
    probs, uniforms = np.broadcast_to(P, (1, 3, 4)), np.array([[0.39, 0.41, 0.95]])
    assert draw_errors(probs, uniforms, np.array([[0, 1, 3]])).tolist() == [[0, 0, 0]]
    assert draw_errors(probs, uniforms, np.array([[1, 0, 2]])).tolist() == [[1, 1, 1]]
    assert draw_errors(probs[:, :1], np.array([[0.4 + 1e-6]]), np.array([[0]])).tolist() == [[0]]


def test_a_pick_under_the_largest_is_an_error():
    assert pick_errors(P[None, None], np.array([[0]])).tolist() == [[0]]
    assert pick_errors(P[None, None], np.array([[1]])).tolist() == [[1]]
