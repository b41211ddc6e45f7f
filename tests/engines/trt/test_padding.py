"""Wider batches give the same numbers: looked at on ONNX Runtime's engines."""

import numpy as np

from engines.arrays import Rows
from engines.base import BackboneBatch
from engines.pack import pack_backbone, pack_target
from engines.trt.padding import pad_backbone, pad_target, wider
from engines.trt.profiles import limits_for, profiles_of

LIMITS = limits_for(requests=16, chunk=64, block=4, vocab=64, max_context=512)
PROFILES = profiles_of(LIMITS)


def test_sizes_are_few_and_never_smaller():
    sizes = (0, 1, 2, 3, 5, 8, 9, 11, 16, 17, 33, 100)
    assert [wider(n, 1000) for n in sizes] == [0, 1, 2, 4, 8, 8, 10, 12, 16, 20, 40, 112]
    assert all(n <= wider(n, 10**6) <= 1.34 * n for n in range(8, 3000))
    assert wider(90, 92) == 92 and len({wider(n, 512) for n in range(1, 513)}) < 30


def test_a_wider_target_pass_is_the_same(plain):
    tokens, lengths, wanted = [[5, 6, 7], [8], [9] * 5], np.zeros(3, np.int64), np.array([2, 1, 5])
    plain.ensure_capacity(3, 40)
    batch, _, _ = pack_target(tokens, lengths, wanted, plain.target_capacity, 512)
    alone = plain.target(batch)
    want = alone.logits.copy(), alone.features.copy()
    padded = pad_target(batch, PROFILES["target"][2])
    assert (len(padded.token_ids), padded.pad_index.shape, len(padded.logit_rows)) == (10, (3, 8), 8)
    got = plain.target(padded)
    np.testing.assert_allclose(got.logits[:8], want[0], atol=2e-5)
    np.testing.assert_allclose(got.features[:9], want[1], atol=2e-5)
    exact = pack_target([[1], [2]], lengths[:2], wanted[1:2].repeat(2), plain.target_capacity, 512)[0]
    assert len(pad_target(exact, PROFILES["target"][0]).token_ids) == 2, "a full pass is not widened"


def test_a_wider_backbone_pass_is_the_same(plain):
    rng = np.random.default_rng(0)
    pieces = [[rng.normal(size=(n, 64)).astype(np.float32)] for n in (3, 6)]
    counts, zero, anchors = np.array([3, 6]), np.zeros(2, np.int64), np.array([1, 2])
    plain.ensure_capacity(2, 40)
    batch = pack_backbone(pieces, counts, zero, anchors, 4, plain.draft_capacity, 512)
    want = [array.copy() for array in plain.backbone(batch).__dict__.values()]
    padded = pad_backbone(batch, PROFILES["backbone"][1])
    assert isinstance(padded.features, Rows) and padded.features.shape[0] == 10 and padded.pad_index.shape == (2, 10)
    filled = np.concatenate([*padded.features.pieces, np.full((1, 64), np.nan, np.float32)])  # whatever lies there
    got = plain.backbone(BackboneBatch(**{**padded.__dict__, "features": filled}))
    np.testing.assert_allclose(got.hidden, want[0], atol=2e-5)
    np.testing.assert_allclose(got.base_logits, want[1], atol=2e-5)
