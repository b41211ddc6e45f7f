"""What every kind of engines does alike: ONNX Runtime's, and TensorRT's runner (on the double of a GPU)."""

from dataclasses import replace

import numpy as np
import pytest

from engines.arrays import to_host
from engines.base import MarkovBatch, VerifyBatch
from engines.pack import pack_backbone, pack_target


def feed(engines, tokens, lengths, first_row=0, last=40):
    """One target pass with logits for every token (of a request's `last` ones); returns (logits, features)."""
    counts = np.array([len(t) for t in tokens], np.int64)
    engines.ensure_capacity(first_row + len(tokens), int(max(lengths)) + int(counts.max()))
    lengths, wanted, S = np.array(lengths, np.int64), np.minimum(counts, last), engines.bundle.max_context
    batch, _, _ = pack_target(tokens, lengths, wanted, engines.target_capacity, S, first_row)
    result = engines.target(batch)
    return to_host(result.logits).copy(), to_host(result.features).copy()


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 60, count).tolist()


def test_a_ragged_batch_equals_each_request_alone(either):
    a, b, c = random_ids(9, 1), random_ids(4, 2), random_ids(13, 3)
    feed(either, [a, b, c], [0, 0, 0])
    logits, features = feed(either, [a[:2], b[:3], c[:1]], [9, 4, 13])
    rows = {0: slice(0, 2), 1: slice(2, 5), 2: slice(5, 6)}
    for i, (ids, more) in enumerate(((a, a[:2]), (b, b[:3]), (c, c[:1]))):
        alone, alone_features = feed(either, [ids + more], [0])
        np.testing.assert_allclose(logits[rows[i]], alone[-len(more) :], atol=2e-5)
        np.testing.assert_allclose(features[rows[i]], alone_features[-len(more) :], atol=2e-5)


def test_a_row_that_only_sits_in_the_pass_is_not_disturbed(either):
    a, b = random_ids(9, 1), random_ids(40, 2)
    want, _ = feed(either, [a + a[:3]], [0])
    feed(either, [a, []], [0, 0])
    feed(either, [[], b], [9, 0])
    got, _ = feed(either, [a[:3], []], [9, 40])
    np.testing.assert_allclose(got, want[9:], atol=2e-5)


def test_rows_can_be_addressed_from_any_first_row(either):
    a, b = random_ids(9, 1), random_ids(7, 2)
    want, _ = feed(either, [b + [5]], [0])
    feed(either, [a, a, b], [0, 0, 0])
    got, _ = feed(either, [[5]], [7], first_row=2)
    np.testing.assert_allclose(got[0], want[-1], atol=2e-5)
    either.move_row(2, 1, 7, 0)
    got, _ = feed(either, [[5]], [7], first_row=1)
    np.testing.assert_allclose(got[0], want[-1], atol=2e-5)


def test_growing_caches_keeps_what_was_written(fresh):
    ids = random_ids(250)
    want, _ = feed(fresh, [ids + [3] * 20], [0])
    feed(fresh, [ids], [0])
    fresh.ensure_capacity(5, 700)
    got, _ = feed(fresh, [[3] * 20, [1]], [250, 0])
    np.testing.assert_allclose(got[:20], want[20:], atol=2e-5)


def decode_round(engines, temperature):
    """target -> backbone -> markov -> confidence -> verify for two requests; returns verify's result."""
    G, bundle = engines.bundle.draft.block_size, engines.bundle
    prompts, zero = [random_ids(9, 1), random_ids(5, 2)], np.zeros(2, np.int64)
    _, features = feed(engines, prompts, [0, 0])
    counts, anchors = np.array([9, 5]), np.array([7, 8])
    pieces = [[features[:9]], [features[9:]]]
    batch = pack_backbone(pieces, counts, zero, anchors, G, engines.draft_capacity, bundle.max_context)
    backbone = engines.backbone(batch)
    sampled = np.arange(2) if temperature else np.zeros(0, np.int64)
    temperatures, half = np.full(len(sampled), temperature, np.float32), np.full((len(sampled), G), 0.5, np.float32)
    markov = MarkovBatch.greedy(backbone.hidden, backbone.base_logits, anchors, bundle.target.vocab_size)
    block = engines.markov(replace(markov, sample_index=sampled, temperature=temperatures, uniforms=half))
    drafts = block.draft_tokens.copy()
    logits, _ = feed(engines, [[7, *drafts[0]], [8, *drafts[1]]], [9, 5])
    rows = np.arange(2 * (G + 1)).reshape(2, G + 1)
    verify = VerifyBatch.greedy(logits, rows, drafts, np.array([G, G]), bundle.draft.vocab_size)
    if temperature:
        verify = replace(
            verify,
            wide_rows=rows.reshape(-1),
            temperature=np.full(rows.size, temperature, np.float32),
            sample_index=sampled,
            sample_rows=rows,
            draft_rows=sampled,
            draft_indices=block.draft_indices,
            draft_probs=block.draft_probs,
            accept_uniforms=half,
            next_uniforms=np.full((2, G + 1), 0.5, np.float32),
        )
    return drafts, logits, engines.verify(verify)


def test_greedy_round_accepts_the_argmax_and_only_it(either):
    drafts, logits, result = decode_round(either, 0.0)
    G = drafts.shape[1]
    top = logits.argmax(-1).reshape(2, G + 1)
    for r in range(2):
        agree = (drafts[r] == top[r, :G]).tolist() + [False]
        accepted = agree.index(False)
        assert result.accepted[r] == accepted and result.next_tokens[r] == top[r, accepted]


def test_what_does_not_fit_a_graph_is_refused(either):
    either.ensure_capacity(1, 100)
    batch, _, _ = pack_target([[1, 2]], np.array([0]), np.array([1]), either.target_capacity + 1, 512)
    with pytest.raises(ValueError, match="do not fit the caches"):
        either.target(batch)
    batch, _, _ = pack_target([[1, 2]], np.array([0]), np.array([1]), either.target_capacity, 512, first_row=63)
    with pytest.raises(ValueError, match="do not fit the caches"):
        either.target(batch)
    batch, _, _ = pack_target([[1, 2]], np.array([0]), np.array([1]), either.target_capacity, 512)
    object.__setattr__(batch, "token_ids", batch.token_ids.astype(np.int32))
    with pytest.raises(ValueError, match="token_ids is int32"):
        either.target(batch)
