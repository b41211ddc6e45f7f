"""One batch through both models: its anchors, and the rows that the losses are taken over."""

from dataclasses import replace

import pytest
import torch

from tests.training.answered import SETTINGS, SHAPE
from training.batch_pass import BatchPass
from training.data import TargetPass, make_batches
from training.initialisation import new_draft


@pytest.fixture
def batch_pass(target, sequences):
    draft = new_draft(target, sequences, SHAPE, 1)
    return BatchPass(target, draft, TargetPass(target, draft.draft_to_target(), 0), SETTINGS)


@pytest.fixture(scope="module")
def batch(sequences):
    return make_batches(sequences, 200, 1024)[0]


def test_anchors_are_valid_distinct_and_as_many_as_asked(batch_pass, batch):
    anchors, keep = batch_pass.anchors(batch, torch.Generator().manual_seed(0))
    for b, n in enumerate(batch.lengths):
        chosen = anchors[b][keep[b]].tolist()
        first = int(batch.loss_mask[b].nonzero()[0])
        assert len(set(chosen)) == len(chosen) == -(-(n - 1 - first) // 2)
        assert all(first <= p < n - 1 for p in chosen)


def test_a_larger_share_draws_more_anchors(batch_pass, batch):
    some = batch_pass.anchors(batch, torch.Generator().manual_seed(0))[1].sum()
    batch_pass.settings = replace(SETTINGS, anchor_share=1.0)
    every = batch_pass.anchors(batch, torch.Generator().manual_seed(0))[1].sum()
    assert every == (batch.loss_mask[:, :-1] & batch.loss_mask[:, 1:]).sum() > some


def test_a_batch_is_a_function_of_the_generator(batch_pass, batch):
    losses = [float(batch_pass(batch, 0, torch.Generator().manual_seed(seed))[1].total.detach()) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_rows_are_the_targets_probabilities_of_the_slots_that_count(batch_pass, batch):
    f, losses, keep = batch_pass(batch, 0, torch.Generator().manual_seed(0))
    N = int(f.valid.sum())
    assert f.valid.shape == (*keep.shape, SHAPE.block_size) and N == len(f.x) == len(f.p_row) == len(f.slot)
    assert len(losses.row_l1) == N and not f.valid[~keep].any()
    assert torch.allclose(f.p.sum(-1), torch.ones(len(f.p)), atol=1e-5)
    assert f.p_row.max() == len(f.p) - 1 and (f.labels >= 0).all()  # nothing is trimmed from this draft's vocabulary
