"""Losses: against the reference implementation's numbers, and the fused softmax against plain autograd."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from training.checkpoint import load_draft
from training.loss import LossWeights, block_acceptance, block_losses, make_slots, named_losses, target_rows
from training.target import PackedBatch, TargetModel

ORACLE = Path(__file__).parent.parent / "oracle"


@pytest.mark.parametrize("name", ["dspark_vanilla", "dflash"])
def test_losses_equal_the_reference(name):
    case = json.loads((ORACLE / name / "reference_loss.json").read_text())
    draft = load_draft(ORACLE / name)
    target = TargetModel.from_pretrained(ORACLE / "target_qwen3", draft.config.target_layer_ids)
    tokens = torch.tensor(case["input_ids"])
    B, S = tokens.shape
    loss_mask = torch.zeros(B, S, dtype=torch.bool)
    loss_mask[:, case["loss_mask_from"] :] = True
    anchors, keep = torch.tensor(case["anchor_positions"]), torch.tensor(case["anchor_keep"]).bool()
    out = target(PackedBatch.build(case["input_ids"], [0] * B, S), torch.arange(0))
    slots = make_slots(tokens, loss_mask, anchors, keep, draft.config.block_size)
    assert int(slots.valid.sum()) == case["eval_mask_sum"]
    hidden = draft.backbone(out.features.view(B, S, -1), tokens.gather(1, anchors), anchors, keep)
    logits, confidence = draft.corrected_logits(hidden, slots.previous)
    p = target_rows(out.last_hidden, target.lm_head.weight, None)
    row = (slots.position + torch.arange(B)[:, None, None] * S)[slots.valid]
    x, identity = logits[slots.valid], torch.eye(logits.shape[-1])
    losses = block_losses(
        x, identity, None if confidence is None else confidence[slots.valid], p, row, slots.labels[slots.valid],
        slots.valid.nonzero()[:, 2], LossWeights(decay=case["loss_decay_gamma"]), draft.config.block_size,
    )  # fmt: skip
    assert float(losses.ce) == pytest.approx(case["ce_loss"], rel=1e-5)
    assert float(losses.l1) == pytest.approx(case["l1_loss"], rel=1e-5)
    assert float(losses.confidence) == pytest.approx(case["confidence_loss"], rel=1e-5)
    total = 0.1 * case["ce_loss"] + 0.9 * case["l1_loss"] + case["confidence_loss"]
    assert float(losses.total) == pytest.approx(total, rel=1e-5)


def random_rows(N=300, K=24, V_d=5000, U=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, head = torch.randn(N, K, generator=g), 0.5 * torch.randn(V_d, K, generator=g)
    judge = 0.5 * torch.randn(V_d, K, generator=g)
    p = target_rows(torch.randn(U, K, generator=g), judge, torch.randn(U, generator=g) + 8)
    labels = torch.randint(-1, V_d, (N,), generator=g)
    labels[:20] = -1
    return x, head, torch.randn(N, generator=g), p, torch.randint(0, U, (N,), generator=g), labels, torch.arange(N) % 6


def plain_total(x, head, confidence, p, p_row, labels, slot):
    """The losses as the paper writes them, over the full vocabulary of V_d + 1 (the last entry: all tokens outside)."""
    w = torch.exp(-slot / 4.0)
    log_q = F.log_softmax(x @ head.t(), dim=-1)
    q = F.pad(log_q.exp(), (0, 1))
    l1 = (q - p[p_row]).abs().sum(-1)
    inside = labels >= 0
    ce = -log_q[inside].gather(1, labels[inside, None])[:, 0]
    c = F.binary_cross_entropy_with_logits(confidence, (1 - 0.5 * l1).detach(), reduction="none")
    mean = lambda v, w: (v * w).sum() / (w.sum() + 1e-6)
    return 0.1 * mean(ce, w[inside]) + 0.9 * mean(l1, w) + mean(c, w)


def test_fused_gradients_equal_autograd():
    rows = random_rows()
    inputs = [r.requires_grad_(True) if i < 3 else r for i, r in enumerate(rows)]
    expected = plain_total(*inputs)
    wanted = torch.autograd.grad(expected, inputs[:3])
    got = block_losses(*inputs, LossWeights(), 6).total
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(got, inputs[:3]), wanted):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=2e-4)


def test_bf16_gradients_point_the_same_way():
    rows = random_rows()
    inputs = [r.requires_grad_(True) if i < 2 else r for i, r in enumerate(rows)]
    full = torch.autograd.grad(block_losses(*inputs, LossWeights(), 6).total, inputs[:2])
    half = torch.autograd.grad(block_losses(*inputs, LossWeights(), 6, torch.bfloat16).total, inputs[:2])
    for a, b in zip(full, half):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_a_label_without_any_probability_has_a_finite_loss_where_subnormals_are_flushed():
    """As the trainer runs. With the weight 0, inf would make the total nan."""
    p, zero = torch.tensor([[0.5, 0.5, 0.0]]), torch.zeros(1, dtype=torch.int64)
    try:
        torch.set_flush_denormal(True)
        for weights in (LossWeights(), named_losses("eagle3", "mtp")):
            losses = block_losses(torch.tensor([[-200.0, 0.0]]), torch.eye(2), None, p, zero, zero, zero, weights, 1)
            assert float(losses.ce) == pytest.approx(87.3, abs=0.1) and torch.isfinite(losses.total)
    finally:
        torch.set_flush_denormal(False)


def test_mass_outside_the_draft_vocabulary_counts_as_rejection():
    p = torch.tensor([[0.25, 0.25, 0.5]])
    q_logits = torch.zeros(1, 2)
    zero = torch.zeros(1, dtype=torch.int64)
    losses = block_losses(q_logits, torch.eye(2), None, p, zero, zero - 1, zero, LossWeights(), 1)
    assert float(losses.row_l1[0]) == pytest.approx(1.0)  # 2 * 0.25 on the draft's tokens + 0.5 outside
    assert float(losses.ce) == 0.0 and torch.isfinite(losses.total)


def test_slots_end_at_the_first_gap_of_the_mask_and_at_the_end():
    tokens = torch.arange(10, 20)[None]
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1]]).bool()
    anchors, keep = torch.tensor([[1, 2, 4, 6, 9, 6]]), torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    slots = make_slots(tokens, mask, anchors, keep, 4)
    assert slots.valid[0].sum(-1).tolist() == [0, 2, 0, 3, 0, 0]
    assert slots.labels[0, 1, :2].tolist() == [13, 14] and slots.previous[0, 1, :2].tolist() == [12, 13]
    assert slots.position[0, 3, :3].tolist() == [6, 7, 8]


def test_block_acceptance_is_the_mean_over_blocks_with_slots():
    valid = torch.tensor([[[1, 1], [1, 0], [0, 0]]]).bool()
    chance, tau = block_acceptance(torch.tensor([0.5, 0.5, 1.0]), valid)
    assert chance == [0.75, 0.5] and tau == pytest.approx(1 + (0.75 + 1.0) / 2, abs=1e-4)


def test_soft_cross_entropy_is_that_of_the_renormalised_target_weighted_by_its_mass():
    """EAGLE-3's loss written out with autograd, with the others beside it; and nothing of it where its weight is 0."""
    x, head, _, p, p_row, labels, slot = random_rows(V_d=700)
    weights = LossWeights(ce=0.3, l1=0.5, confidence=0.0, soft=0.7)
    given = [t.clone().requires_grad_() for t in (x, head)]
    losses = block_losses(*given, None, p, p_row, labels, slot, weights, 6)
    plain = [t.clone().requires_grad_() for t in (x, head)]
    inside, mass = p[p_row, :-1], 1 - p[p_row, -1]
    log_q = torch.log_softmax(plain[0] @ plain[1].t(), -1)
    each = -(inside / inside.sum(-1, keepdim=True) * log_q).sum(-1)
    w = torch.exp(-slot / weights.decay) * mass
    soft = (each * w).sum() / w.sum()
    assert 0 < float(mass.min()) < 0.9 * float(mass.max()) and losses.soft.item() == pytest.approx(soft.item(), rel=1e-5)
    rest = block_losses(*plain, None, p, p_row, labels, slot, replace(weights, soft=0.0), 6)
    assert float(rest.soft) == 0
    (rest.total + 0.7 * soft).backward()
    losses.total.backward()
    for ours, theirs in zip(given, plain):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_losses_go_by_name_and_by_kind():
    assert named_losses("", "dspark") == named_losses("dspark", "mtp") == LossWeights()
    assert named_losses("", "mtp") == named_losses("eagle3", "dflash") and named_losses("", "eagle3").ce == 0
    assert [round(float(v), 4) for v in named_losses("", "eagle3").position(3)] == [1, 0.8, 0.64]
    with pytest.raises(ValueError, match="loss is 'kl'; it must be one of dspark, eagle3, both."):
        named_losses("kl", "dspark")
