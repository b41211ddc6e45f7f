"""The verify graph: greedy, rejection and coupled rules, edits, filters, log-probs, and the distribution they give."""

from __future__ import annotations

import numpy as np
import pytest

from decoding.random import gumbel
from engines.base import VerifyBatch
from export.reference import keep, softmax, verify_reference
from export.runner import Runner
from export.verify import build_verify
from export.wide_rows import RULES, WideRows


def runner_for(folder, G: int, V: int, to_target: np.ndarray) -> Runner:
    graph = build_verify(G, V, to_target)
    graph.save(folder)
    return Runner(folder, graph)


def greedy(logits, row_index, draft_tokens, num_draft, V_d) -> dict[str, np.ndarray]:
    f = np.asarray
    return dict(VerifyBatch.greedy(f(logits, np.float32), f(row_index), f(draft_tokens), f(num_draft), V_d).__dict__)


def random_feeds(R: int, G: int, V: int, to_target: np.ndarray, rules: list[str], edited: bool, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    temperature = np.array([0 if r == "greedy" else 0.5 + rng.random() for r in rules], np.float32)
    logits = 3 * rng.standard_normal((R, G + 1, V), dtype=np.float32)
    draft_logits = logits[:, :G][..., to_target] + rng.standard_normal((R, G, len(to_target)), dtype=np.float32)
    probs = softmax(draft_logits / np.where(temperature > 0, temperature, 1)[:, None, None]).astype(np.float32)
    drawn = (probs.cumsum(-1) < rng.random((R, G, 1))).sum(-1).clip(max=len(to_target) - 1)
    indices = np.where(temperature[:, None] > 0, drawn, draft_logits.argmax(-1))
    num_draft = rng.integers(0, G + 1, R)
    rows = np.arange(R * (G + 1)).reshape(R, G + 1)
    wide = WideRows(np.minimum(rows, rows[:, :1] + num_draft[:, None]), num_draft, temperature, rules)
    own = probs[[rule == "rejection" for rule in rules]]
    return wide.feeds(logits.reshape(-1, V), to_target[indices], indices, own, rng, edited)


@pytest.mark.parametrize("V, trimmed", [(50, False), (50, True), (3000, True)])
@pytest.mark.parametrize("kind", ["greedy", "rejection", "coupled", "mixed"])
@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited and filtered"])
def test_equals_the_reference(tmp_path, V, trimmed, kind, edited):
    G, R = 4, 60
    to_target = np.arange(0, V, 3) if trimmed else np.arange(V)
    rules = [RULES[r % 3] if kind == "mixed" else kind for r in range(R)]
    feeds = random_feeds(R, G, V, to_target, rules, edited)
    got = runner_for(tmp_path, G, V, to_target)(**feeds)
    want = verify_reference(feeds, to_target)
    np.testing.assert_array_equal(got["accepted"], want.accepted)
    assert ((want.low <= got["next_tokens"]) & (got["next_tokens"] <= want.high)).all()
    firm = (want.low == want.high)[feeds["log_prob_at"][:, 0]]
    np.testing.assert_allclose(got["log_probs"][firm], want.log_probs[firm], atol=1e-5)
    assert {0, 1} <= set(want.accepted.tolist()) and (want.low == want.high).mean() > 0.95


@pytest.mark.parametrize("V", [61, 3001, 4096])
def test_a_request_gets_the_same_bits_alone_and_in_any_batch(tmp_path, V):
    """Coupled decoding equals plain decoding only if a row's verdict does not depend on the other rows."""
    G, R = 3, 24
    feeds = random_feeds(R, G, V, np.arange(V), [RULES[r % 3] for r in range(R)], True)
    run = runner_for(tmp_path, G, V, np.arange(V))
    whole = run(**feeds)
    firsts = np.cumsum(feeds["num_draft"] + 1) - feeds["num_draft"] - 1
    for r in range(R):
        rows = firsts[r] + np.arange(feeds["num_draft"][r] + 1)  # every request has wide rows: in order
        place = {int(w): k for k, w in enumerate(rows)}
        at = lambda key: np.isin(feeds[key], rows)
        drawn, moved = feeds["sample_index"] == r, lambda x: np.vectorize(place.get, otypes=[np.int64])(x)
        edits, filtered, matched = np.isin(feeds["edit_at"][:, 0], rows), at("filter_rows"), at("match_rows")
        probs = np.flatnonzero(drawn)
        mine = feeds["log_prob_at"][:, 0] == r
        start = feeds["row_index"][r, 0]
        alone = dict(
            logits=feeds["logits"][start : start + len(rows)].copy(), row_index=feeds["row_index"][[r]] - start,
            draft_tokens=feeds["draft_tokens"][[r]], num_draft=feeds["num_draft"][[r]],
            wide_rows=feeds["wide_rows"][rows] - start, temperature=feeds["temperature"][rows],
            edit_at=np.column_stack([moved(feeds["edit_at"][edits, 0]), feeds["edit_at"][edits, 1]]),
            edit_scale=feeds["edit_scale"][edits], edit_add=feeds["edit_add"][edits],
            filter_rows=moved(feeds["filter_rows"][filtered]), top_count=feeds["top_count"],
            **{k: feeds[k][filtered] for k in ("top_k", "top_p", "min_p")},
            match_rows=moved(feeds["match_rows"][matched]), noise=feeds["noise"][matched],
            match_filtered=np.flatnonzero(np.isin(np.flatnonzero(matched), feeds["match_filtered"])),
            sample_index=np.zeros(len(probs), np.int64), sample_rows=moved(feeds["sample_rows"][drawn]).reshape(-1, G + 1),
            draft_rows=np.zeros(len(probs), np.int64), draft_indices=feeds["draft_indices"][drawn],
            draft_probs=feeds["draft_probs"][probs] if len(probs) else feeds["draft_probs"][:1],
            accept_uniforms=feeds["accept_uniforms"][drawn], next_uniforms=feeds["next_uniforms"][drawn],
            log_prob_rows=feeds["log_prob_rows"][mine] - start,
            log_prob_at=feeds["log_prob_at"][mine] * [0, 1],
        )  # fmt: skip
        got = run(**alone)
        assert (got["accepted"][0], got["next_tokens"][0]) == (whole["accepted"][r], whole["next_tokens"][r])
        np.testing.assert_array_equal(got["log_probs"], whole["log_probs"][mine])


def test_token_outside_the_draft_vocabulary_can_be_next(tmp_path):
    """q = 0 outside the draft vocabulary: a rejection there must be able to give any target token."""
    V, to_target = 8, np.array([2, 5])
    logits = np.full((2, V), -20, np.float32)
    logits[:, 7] = 20
    feeds = greedy(logits, [[0, 1]], [[5]], [1], 2) | one_sample([[0.5, 0.5]], 1, accept=0.5, following=0.5)
    got = runner_for(tmp_path, 1, V, to_target)(**feeds)
    assert got["accepted"].tolist() == [0] and got["next_tokens"].tolist() == [7]


def test_an_empty_residual_falls_back_to_the_target(tmp_path):
    """p = q and a uniform of 1 (which no caller sends): rejected with max(p - q, 0) = 0 everywhere; drawn from p."""
    V = 4
    feeds = greedy(np.zeros((2, V)), [[0, 1]], [[3]], [1], V) | one_sample([[0.25] * V], 3, accept=1, following=0.6)
    got = runner_for(tmp_path, 1, V, np.arange(V))(**feeds)
    assert got["accepted"].tolist() == [0] and got["next_tokens"].tolist() == [2]


def one_sample(q, index: int, accept: float, following: float) -> dict[str, np.ndarray]:
    """One request of the rejection rule with one draft token, at temperature 1."""
    f32, ints = lambda x: np.array(x, np.float32), lambda x: np.array(x, np.int64)
    return dict(
        wide_rows=ints([0, 1]), temperature=f32([1, 1]), sample_index=ints([0]), sample_rows=ints([[0, 1]]), draft_rows=ints([0]),
        draft_indices=ints([[index]]), draft_probs=f32([q]), accept_uniforms=f32([[accept]]), next_uniforms=f32([[following] * 2]),
    )


# -- filters ------------------------------------------------------------------------------------------------------------


def kept_by_the_graph(run: Runner, logits: np.ndarray, top_k, top_p, min_p, top_count: int):
    """(bool [rows, V], complete [rows]): a token is kept iff overwhelming noise on it makes it the pick."""
    rows, V = logits.shape
    kept = np.zeros((rows, V), bool)
    for token in range(V):
        noise = np.zeros((rows, V), np.float32)
        noise[:, token] = 1e6
        every, f32 = np.arange(rows), np.float32
        feeds = greedy(logits, every[:, None].repeat(2, 1), np.zeros((rows, 1), np.int64), np.zeros(rows, np.int64), V) | dict(
            wide_rows=every, temperature=np.ones(rows, f32), filter_rows=every, top_k=np.asarray(top_k), top_p=np.asarray(top_p, f32),
            min_p=np.asarray(min_p, f32), top_count=np.array([top_count]), match_rows=every, noise=noise, match_filtered=every,
        )
        got = run(**feeds)
        kept[:, token] = got["next_tokens"] == token
    return kept, got["complete"]


def filter_rows(V: int, seed: int = 0):
    """Random rows, rows of few values (ties), an all-equal row, a row with one token left; filters of every mixture."""
    rng = np.random.default_rng(seed)
    logits = np.concatenate([2 * rng.standard_normal((20, V)), rng.integers(0, 3, (20, V))]).astype(np.float32)
    logits[20], logits[21] = 1.25, -1e30
    logits[21, 5] = 3
    R = len(logits)
    return logits, rng.choice([V, 1, 3, 10], R), rng.choice([1, 0.05, 0.5, 0.9, 0.999], R), rng.choice([0, 0.02, 0.5], R)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return runner_for(tmp_path_factory.mktemp("small"), 1, 30, np.arange(30))


def test_filters_keep_what_a_plain_reading_keeps(small):
    logits, top_k, top_p, min_p = filter_rows(30)
    got, complete = kept_by_the_graph(small, logits, top_k, top_p, min_p, 30)
    want = np.stack([keep(softmax(x), k, float(np.float32(p)), m) for x, k, p, m in zip(logits, top_k, top_p, min_p)])
    # float32 sums may fall on the other side of top_p: only where the mass above is within rounding of it
    odd = np.argwhere(got != want)
    for row, token in odd:
        p = softmax(logits[row])
        inside = p >= np.sort(p)[-top_k[row]]
        above = p[inside & (p > p[token] * (1 + 1e-9))].sum() / p[inside].sum()
        assert abs(above - top_p[row]) < 1e-6
    assert complete.all() and len(odd) <= 3 and got[:, :].any(axis=1).all()
    assert got[21].sum() == 1 and got[20].all() and 1 < got.sum(1).mean() < 25


@pytest.mark.parametrize("count", [1, 2, 5, 12, 29])
def test_too_small_a_top_count_is_reported_and_never_changes_a_complete_row(small, count):
    logits, top_k, top_p, min_p = filter_rows(30, seed=1)
    want, _ = kept_by_the_graph(small, logits, top_k, top_p, min_p, 30)
    got, complete = kept_by_the_graph(small, logits, top_k, top_p, min_p, count)
    np.testing.assert_array_equal(got[complete], want[complete])
    assert not complete[(top_k > count) & (top_k < 30)].any()
    without_ties = np.arange(len(logits)) < 20
    incomplete_nucleus = without_ties & (top_k == 30) & (top_p < 1) & (want.sum(1) > count) & (min_p == 0)
    assert not complete[incomplete_nucleus].any() and complete[(top_k == 30) & (top_p == 1)].all()
    assert complete.any() and (count > 12 or not complete.all())


# -- distributions -------------------------------------------------------------------------------------------------------


def distance(tokens: np.ndarray, exact: np.ndarray) -> float:
    """Total variation."""
    return np.abs(np.bincount(tokens, minlength=len(exact)) / len(tokens) - exact).sum() / 2


@pytest.mark.parametrize("top_p", [1, 0.8])
@pytest.mark.parametrize("broken", [None, "accepts everything", "residual not renormalised"])
def test_first_token_has_the_targets_distribution(tmp_path, top_p, broken):
    """20,000 rounds with x drawn from q: the first emitted token is distributed as the filtered p (total variation < 0.02),
    and is not when every draft token is accepted, or the filtered p is not renormalised."""
    V, R, rng = 12, 20_000, np.random.default_rng(2)
    to_target = np.arange(1, V, 2)
    logits = 0.8 * rng.standard_normal((2, V), dtype=np.float32)
    p = softmax(logits[0])
    p = np.where(keep(p, 0, top_p), p, 0)
    q = softmax(1.5 * rng.standard_normal(len(to_target))).astype(np.float32)
    indices, every, f32 = rng.choice(len(to_target), p=q / q.sum(dtype=np.float64), size=(R, 1)), np.arange(R), np.float32
    rows = np.tile([[0, 1]], (R, 1))
    feeds = greedy(logits, rows, to_target[indices], np.ones(R, np.int64), len(to_target)) | dict(
        wide_rows=np.arange(2), temperature=np.ones(2, f32), sample_index=every, sample_rows=rows, draft_rows=every,
        draft_indices=indices, draft_probs=np.tile(q, (R, 1, 1)), accept_uniforms=rng.random((R, 1), dtype=f32),
        next_uniforms=rng.random((R, 2), dtype=f32), filter_rows=np.arange(2), top_k=np.array([V, V]),
        top_p=np.full(2, top_p, f32), min_p=np.zeros(2, f32), top_count=np.array([V]),
    )
    if broken == "accepts everything":
        feeds["accept_uniforms"] *= 0
    if broken == "residual not renormalised":
        feeds["draft_probs"] = feeds["draft_probs"] * f32(0.7)
    got = runner_for(tmp_path, 1, V, to_target)(**feeds)
    first = np.where(got["accepted"] > 0, feeds["draft_tokens"][:, 0], got["next_tokens"])
    off = distance(first, p / p.sum())
    assert off > 0.04 if broken else off < 0.02


@pytest.mark.parametrize("top_k", [12, 4])
def test_a_matched_row_has_the_targets_distribution(tmp_path, top_k):
    """20,000 positions' own noise at temperature 0.7."""
    V, R, T = 12, 20_000, np.float32(0.7)
    logits = 1.5 * np.random.default_rng(3).standard_normal((1, V), dtype=np.float32)
    every, f32 = np.arange(R), np.float32
    noise = np.stack([gumbel(5, i, np.empty(V, f32)) for i in range(R)])
    feeds = greedy(np.tile(logits, (R, 1)), every[:, None].repeat(2, 1), np.zeros((R, 1), np.int64), np.zeros(R, np.int64), V) | dict(
        wide_rows=every, temperature=np.full(R, T), match_rows=every, noise=noise, match_filtered=every, filter_rows=every,
        top_k=np.full(R, top_k), top_p=np.ones(R, f32), min_p=np.zeros(R, f32), top_count=np.array([top_k]),
    )
    p = softmax(logits[0] / T)
    p = np.where(keep(p, top_k), p, 0)
    assert distance(runner_for(tmp_path, 1, V, np.arange(V))(**feeds)["next_tokens"], p / p.sum()) < 0.015
