"""The host's greedy verdicts are the verify graph's, ties included; what is not plain greedy goes to the graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engines import greedy
from engines.base import VerifyBatch, VerifyResult


def random_batch(engines, rng, R: int) -> VerifyBatch:
    """Logits of few different values (ties everywhere), drafts that often are the argmax, ragged blocks."""
    G, V = engines.bundle.draft.block_size, engines.bundle.target.vocab_size
    num_draft = rng.integers(0, G + 1, R)
    first = np.cumsum(num_draft + 1) - num_draft - 1
    rows = first[:, None] + np.minimum(np.arange(G + 1), num_draft[:, None])
    logits = rng.integers(0, 3, (int((num_draft + 1).sum()), V)).astype(np.float32)
    right = logits.argmax(axis=1)[rows[:, :G]]
    drafts = np.where(rng.random((R, G)) < 0.8, right, rng.integers(0, V, (R, G)))
    return VerifyBatch.greedy(logits, rows, drafts, num_draft, engines.bundle.draft.vocab_size)


@pytest.mark.parametrize("R", [1, 2, 9])
def test_it_says_what_the_graph_says(loaded, R):
    rng, accepted = np.random.default_rng(R), []
    for _ in range(20):
        batch = random_batch(loaded, rng, R)
        graph = VerifyResult(**loaded._graphs["verify"].run(batch.__dict__))
        host = greedy.verify(batch)
        for name, value in graph.__dict__.items():
            got = getattr(host, name)
            np.testing.assert_array_equal(got, value)
            assert got.dtype == value.dtype and got.shape == value.shape, name
        accepted += graph.accepted.tolist()
    assert {0, 1, 2} <= set(accepted)


def test_only_plain_batches_stay_on_the_host(loaded):
    plain = random_batch(loaded, np.random.default_rng(0), 2)
    assert greedy.is_plain(plain)
    assert not greedy.is_plain(replace(plain, wide_rows=np.array([0]), temperature=np.ones(1, np.float32)))
    assert not greedy.is_plain(replace(plain, log_prob_rows=np.array([0]), log_prob_at=np.array([[0, 0]])))
