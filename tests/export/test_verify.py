"""The verify graph: greedy, the accept rule, the residual, the trimmed draft vocabulary, and the distribution it gives."""

from __future__ import annotations

import numpy as np
import pytest

from export.graph import Graph
from export.parity import Runner
from export.reference import softmax, verify_reference
from export.verify import build_verify


def runner_for(folder, G: int, V: int, to_target: np.ndarray) -> Runner:
    graph: Graph = build_verify(G, V, to_target)
    graph.save(folder)
    return Runner(folder, graph)


def random_feeds(R: int, G: int, V: int, to_target: np.ndarray, temperature: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((R, G + 1, V), dtype=np.float32)
    draft_logits = logits[:, :G][..., to_target] + rng.standard_normal((R, G, len(to_target)), dtype=np.float32)
    probs = softmax(draft_logits / np.where(temperature > 0, temperature, 1)[:, None, None]).astype(np.float32)
    drawn = (probs.cumsum(-1) < rng.random((R, G, 1))).sum(-1).clip(max=len(to_target) - 1)
    indices = np.where(temperature[:, None] > 0, drawn, draft_logits.argmax(-1))
    num_draft = rng.integers(0, G + 1, R)
    rows = np.arange(R * (G + 1)).reshape(R, G + 1)
    return dict(
        logits=logits.reshape(-1, V), row_index=np.minimum(rows, rows[:, :1] + num_draft[:, None]), draft_tokens=to_target[indices],
        draft_indices=indices, draft_probs=probs, num_draft=num_draft, temperature=temperature.astype(np.float32),
        sample_index=np.flatnonzero(temperature > 0), accept_uniforms=rng.random((R, G), dtype=np.float32),
        next_uniforms=rng.random((R, G + 1), dtype=np.float32),
    )


@pytest.mark.parametrize("V, trimmed", [(50, False), (50, True), (3000, True)])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "mixed"])
def test_equals_the_reference(tmp_path, V, trimmed, kind):
    G, R = 4, 120
    to_target = np.arange(0, V, 3) if trimmed else np.arange(V)
    share = {"greedy": 0, "sampled": 1, "mixed": 0.5}[kind]
    rng = np.random.default_rng(1)
    temperature = np.where(rng.random(R) < share, 0.5 + rng.random(R), 0)
    feeds = random_feeds(R, G, V, to_target, temperature)
    got = runner_for(tmp_path, G, V, to_target)(**feeds)
    accepted, low, high = verify_reference(**feeds, draft_to_target=to_target)
    np.testing.assert_array_equal(got["accepted"], accepted)
    assert ((low <= got["next_tokens"]) & (got["next_tokens"] <= high)).all()
    assert {0, 1} <= set(accepted.tolist()) and (low == high).mean() > 0.95


def test_token_outside_the_draft_vocabulary_can_be_next(tmp_path):
    """q = 0 outside the draft vocabulary: a rejection there must be able to give any target token."""
    V, to_target = 8, np.array([2, 5])
    logits = np.full((2, V), -20, np.float32)
    logits[:, 7] = 20
    feeds = dict(
        logits=logits, row_index=np.array([[0, 1]]), draft_tokens=np.array([[5]]), draft_indices=np.array([[1]]),
        draft_probs=np.array([[[0.5, 0.5]]], np.float32), num_draft=np.array([1]), temperature=np.ones(1, np.float32),
        sample_index=np.array([0]), accept_uniforms=np.full((1, 1), 0.5, np.float32), next_uniforms=np.full((1, 2), 0.5, np.float32),
    )
    got = runner_for(tmp_path, 1, V, to_target)(**feeds)
    assert got["accepted"].tolist() == [0] and got["next_tokens"].tolist() == [7]


def test_an_empty_residual_falls_back_to_the_target(tmp_path):
    """p = q and a uniform of 1 (which no caller sends): rejected with max(p - q, 0) = 0 everywhere; drawn from p."""
    V = 4
    feeds = dict(
        logits=np.zeros((2, V), np.float32), row_index=np.array([[0, 1]]), draft_tokens=np.array([[3]]),
        draft_indices=np.array([[3]]), draft_probs=np.full((1, 1, V), 0.25, np.float32), num_draft=np.array([1]),
        temperature=np.ones(1, np.float32), sample_index=np.array([0]), accept_uniforms=np.ones((1, 1), np.float32),
        next_uniforms=np.full((1, 2), 0.6, np.float32),
    )
    got = runner_for(tmp_path, 1, V, np.arange(V))(**feeds)
    assert got["accepted"].tolist() == [0] and got["next_tokens"].tolist() == [2]


@pytest.mark.parametrize("broken", [False, True])
def test_first_token_has_the_targets_distribution(tmp_path, broken):
    """20,000 rounds with x drawn from q: the first emitted token is distributed as p (total variation < 0.02), and is
    not when the accept rule is broken (every draft token accepted)."""
    V, R, rng = 12, 20_000, np.random.default_rng(2)
    to_target = np.arange(1, V, 2)
    logits = 1.5 * rng.standard_normal((2, V), dtype=np.float32)
    q = softmax(1.5 * rng.standard_normal(len(to_target))).astype(np.float32)
    indices = rng.choice(len(to_target), p=q / q.sum(dtype=np.float64), size=(R, 1))
    feeds = dict(
        logits=logits, row_index=np.tile([[0, 1]], (R, 1)), draft_tokens=to_target[indices], draft_indices=indices,
        draft_probs=np.tile(q, (R, 1, 1)), num_draft=np.ones(R, np.int64), temperature=np.ones(R, np.float32),
        sample_index=np.arange(R), accept_uniforms=np.zeros((R, 1), np.float32) if broken else rng.random((R, 1), dtype=np.float32),
        next_uniforms=rng.random((R, 2), dtype=np.float32),
    )
    got = runner_for(tmp_path, 1, V, to_target)(**feeds)
    first = np.where(got["accepted"] > 0, feeds["draft_tokens"][:, 0], got["next_tokens"])
    distance = np.abs(np.bincount(first, minlength=V) / R - softmax(logits[0])).sum() / 2
    assert (distance > 0.1) if broken else (distance < 0.02)
