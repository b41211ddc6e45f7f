"""The verify graph's random inputs: which requests appear in which lists (docs/structures.md, 5.)."""

from __future__ import annotations

import numpy as np
import pytest

from export.wide_rows import RULES, WideRows

G, V = 3, 50
COUNTS = np.array([3, 1, 2])  # draft tokens of a greedy, a rejection and a coupled request


def feeds(edited: bool) -> dict:
    firsts = np.cumsum(COUNTS + 1) - COUNTS - 1
    row_index = firsts[:, None] + np.minimum(np.arange(G + 1), COUNTS[:, None])
    wide = WideRows(row_index, COUNTS, np.array([0, 1, 0.7], np.float32), list(RULES))
    zeros = np.zeros((3, G), np.int64)
    rng = np.random.default_rng(0)
    return wide.feeds(np.zeros((9, V), np.float32), zeros, zeros, np.full((1, G, V), 1 / V), rng, edited)


def test_plain_greedy_requests_are_in_no_list():
    f = feeds(False)
    assert f["wide_rows"].tolist() == [4, 5, 6, 7, 8] and f["match_rows"].tolist() == [2, 3, 4]
    assert f["sample_index"].tolist() == [1] and f["sample_rows"].tolist() == [[0, 1, 1, 1]]
    assert all(len(f[name]) == 0 for name in ("edit_at", "filter_rows", "log_prob_rows", "match_filtered"))


def test_edited_requests_are_in_all_of_them():
    f = feeds(True)
    assert f["wide_rows"].tolist() == f["log_prob_rows"].tolist() == list(range(9))
    assert f["filter_rows"].tolist() == [4, 5, 6, 7, 8]
    assert f["match_rows"].tolist() == [0, 1, 2, 3, 6, 7, 8] and f["match_filtered"].tolist() == [4, 5, 6]
    assert not f["noise"][:4].any() and f["noise"][4:].all()  # a greedy request's noise is zeros
    assert len(np.unique(f["edit_at"], axis=0)) == len(f["edit_at"]) == 9 * 40


@pytest.mark.parametrize("edited", [False, True])
def test_index_tensors_are_int64_and_the_others_float32(edited):
    floats = {"temperature", "edit_scale", "edit_add", "top_p", "min_p", "noise", "accept_uniforms", "next_uniforms"}
    for name, array in feeds(edited).items():
        if name not in ("logits", "draft_probs"):
            assert array.dtype == (np.float32 if name in floats else np.int64), name
