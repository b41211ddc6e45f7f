"""The three training losses of DSpark (paper eq. 8-12), EAGLE-3's one, and the slots that they are taken over.

Knows: which slot predicts which token, the losses, a fused softmax whose gradients are made in its forward pass.
Refuses to know: models, optimisers, where target distributions come from.

Legend: B sequences, S positions, A anchors a sequence, G block size, V target vocabulary, V_d draft vocabulary,
N slots that count (rows), U distinct target positions among them, K = d + r (hidden state and Markov latent).

With a trimmed vocabulary the draft's distribution q lives on V_d tokens and the target's p on all V. A row of p is kept
as V_d + 1 numbers: p on the draft's tokens, and the mass outside. |q - p|_1 is the sum over V_d plus that mass.

EAGLE-3's soft cross-entropy is that of p on the draft's tokens, made to sum to 1, each row weighted by p's mass on
them. (Its own code drops the rows whose likeliest token lies outside; the mass says the same softly.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from training.layers import softcapped

SMALLEST = torch.finfo(torch.float32).tiny  # a subnormal floor is 0 where those are flushed (the trainer's run)
CHUNK_ELEMENTS = 1 << 18  # float32 numbers handled at once in the fused softmax: 1 MB stays in a core's cache


@dataclass(frozen=True)
class LossWeights:
    """Weights of cross-entropy, L1 (twice the total variation), confidence and EAGLE-3's soft cross-entropy; decay:
    gamma of exp(-k / gamma)."""

    ce: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    soft: float = 0.0

    def position(self, G: int) -> Tensor:
        """[G] float32: exp(-k / decay)."""
        return torch.exp(-torch.arange(G, dtype=torch.float32) / self.decay)


DSPARK = LossWeights()
EAGLE3 = LossWeights(ce=0.0, l1=0.0, confidence=0.0, decay=-1 / math.log(0.8), soft=1.0)  # its code weighs step k 0.8^k
NAMED = {"dspark": DSPARK, "eagle3": EAGLE3, "both": replace(DSPARK, soft=1.0)}


def named_losses(name: str, kind: str) -> LossWeights:
    """By name; an empty one is what this kind of head is usually trained with. Raises ValueError."""
    name = name or ("eagle3" if kind in ("eagle3", "mtp") else "dspark")
    if name not in NAMED:
        raise ValueError(f"loss is {name!r}; it must be one of {', '.join(NAMED)}.")
    return NAMED[name]


@dataclass(frozen=True)
class Slots:
    """All [B, A, G]: labels (token at p+1+k), previous (token at p+k), position (p+k, where the target judges slot k),
    int64; valid bool."""

    labels: Tensor
    previous: Tensor
    position: Tensor
    valid: Tensor


def make_slots(tokens: Tensor, loss_mask: Tensor, anchors: Tensor, keep: Tensor, G: int) -> Slots:
    """tokens [B, S] int64, loss_mask [B, S] bool, anchors [B, A] positions, keep [B, A] bool.

    An anchor p counts when loss_mask[p] and loss_mask[p+1]; slot k counts while every label up to its own lies inside
    the sequence and has loss_mask.
    """
    S = tokens.shape[1]
    position = anchors[..., None] + torch.arange(G)
    inside = position + 1 < S
    label_at = (position + 1).clamp(max=S - 1).flatten(1)
    pick = lambda x, at: x.gather(1, at).unflatten(1, anchors.shape[1:] + (G,))
    runs = (pick(loss_mask, label_at) & inside).int().cumprod(-1).bool()
    valid = runs & (keep & loss_mask.gather(1, anchors))[..., None]
    position = position.clamp(max=S - 1)
    return Slots(pick(tokens, label_at), pick(tokens, position.flatten(1)), position, valid)


@dataclass(frozen=True)
class Losses:
    """ce, l1, confidence, soft: scalars, each a mean weighted by slot position (soft: 0 where its weight is 0); total:
    their weighted sum. row_l1 [N], detached; the chance of acceptance of a row is 1 - row_l1 / 2."""

    total: Tensor
    ce: Tensor
    l1: Tensor
    confidence: Tensor
    soft: Tensor
    row_l1: Tensor


def target_rows(hidden: Tensor, head: Tensor, outside: Tensor | None, softcap: float | None = None) -> Tensor:
    """Target distributions [U, V_d + 1] float32: hidden [U, d], head [V_d, d] (the target's rows of the draft's
    tokens), outside [U] = logsumexp of the other tokens' logits, or None when there are none; softcap: the target's."""
    logits = softcapped(hidden.float() @ head.float().t(), softcap)
    last = torch.full((len(hidden), 1), -torch.inf) if outside is None else outside[:, None]
    return torch.softmax(torch.cat([logits, last], dim=-1), dim=-1)


def block_losses(
    x: Tensor,
    head: Tensor,
    confidence: Tensor | None,
    p: Tensor,
    p_row: Tensor,
    labels: Tensor,
    slot: Tensor,
    weights: LossWeights,
    G: int,
    compute_dtype: torch.dtype = torch.float32,
    softcap: tuple[float, int] | None = None,
) -> Losses:
    """Losses of N rows: x [N, K], head [V_d, K] (logits are x @ head.T; softcap (c, d): the part of the first d columns
    is c * tanh(. / c), as a Gemma4 draft's base logits are), confidence logits [N] or None, p [U, V_d + 1],
    p_row [N] (a row's place in p), labels [N] (ids in the draft vocabulary, -1 outside: no cross-entropy), slot
    [N] (k).

    Each loss is divided by the sum of its own rows' weights + 1e-6. compute_dtype: of the matrix products.
    """
    w = weights.position(G)[slot]
    w_ce = torch.where(labels >= 0, w, 0.0)
    total, total_ce = w.sum() + 1e-6, w_ce.sum() + 1e-6
    scale_ce, scale_l1 = weights.ce * w_ce / total_ce, weights.l1 * w / total
    scale_soft, total_soft = None, 1.0
    if weights.soft:
        total_soft = (w * (1 - p[p_row, -1])).sum() + 1e-6
        scale_soft = weights.soft * w / total_soft
    loss, row_ce, row_l1, row_soft = FusedSoftmaxLoss.apply(
        x, head, p, p_row, labels, scale_ce, scale_l1, compute_dtype, scale_soft, softcap
    )
    confidence_loss = torch.zeros(())
    if confidence is not None:
        chance = (1 - 0.5 * row_l1).clamp(0, 1)
        confidence_loss = (F.binary_cross_entropy_with_logits(confidence, chance, reduction="none") * w).sum() / total
        loss = loss + weights.confidence * confidence_loss
    soft = (row_soft * w).sum() / total_soft
    return Losses(loss, (row_ce * w_ce).sum() / total_ce, (row_l1 * w).sum() / total, confidence_loss, soft, row_l1)


def row_logits(x: Tensor, head: Tensor, softcap: tuple[float, int] | None) -> Tensor:
    """x [N, K], head [V_d, K] -> [N, V_d]; softcap as in block_losses."""
    if softcap is None:
        return x @ head.t()
    cap, d = softcap
    return softcapped(x[:, :d] @ head[:, :d].t(), cap) + x[:, d:] @ head[:, d:].t()


class FusedSoftmaxLoss(torch.autograd.Function):
    """sum(scale_ce * CE + scale_l1 * |q - p|_1 - scale_soft * <p, log q>) over the rows, with q = softmax(x @ head.T);
    scale_soft None leaves the last one out.

    The gradient of the logits overwrites them chunk by chunk while they are in the cache, so that no [N, V_d] float32
    tensor ever exists: dCE/dz = q - onehot, d|q-p|_1/dz = q * (s - <q, s>) with s = sign(q - p),
    d(-sum p log q)/dz = m q - p with m the sum of p over V_d. The CE that is reported ends at 87.3 nats (SMALLEST).
    """

    @staticmethod
    def forward(ctx, x, head, p, p_row, labels, scale_ce, scale_l1, compute_dtype, scale_soft=None, softcap=None):
        x_c, head_c = x.detach().to(compute_dtype), head.detach().to(compute_dtype)
        z = row_logits(x_c, head_c, softcap)
        N, V_d = z.shape
        row_ce, row_l1, row_soft = torch.empty(N), torch.empty(N), torch.zeros(N)
        step = max(1, CHUNK_ELEMENTS // V_d)
        for i in range(0, N, step):
            rows = slice(i, min(i + step, N))
            q = torch.softmax(z[rows], dim=-1, dtype=torch.float32)
            label = labels[rows, None].clamp_min(0)
            row_ce[rows] = -q.gather(1, label)[:, 0].clamp_min(SMALLEST).log()
            target = p[p_row[rows]].float()
            difference = torch.sub(q, target[:, :V_d])
            row_l1[rows] = difference.abs().sum(-1) + target[:, V_d]
            difference.sign_()
            inner = torch.linalg.vecdot(q, difference)
            a, b = scale_l1[rows, None], scale_ce[rows, None]
            difference.mul_(a).add_(b - a * inner[:, None]).mul_(q)  # the gradient of the logits
            difference.scatter_add_(1, label, -b)
            if scale_soft is not None:
                c, known, mass = scale_soft[rows, None], target[:, :V_d], 1 - target[:, V_d]
                row_soft[rows] = -torch.linalg.vecdot(known, torch.log_softmax(z[rows].float(), dim=-1))
                difference.add_(c * (mass[:, None] * q - known))
            z[rows] = difference
        if softcap is None:
            ctx.save_for_backward(z @ head_c, z.t() @ x_c)
        else:
            cap, d = softcap
            bent = torch.tanh(x_c[:, :d] @ head_c[:, :d].t() / cap)
            base = z * (1 - bent * bent)  # the gradient of what was bent
            gx = torch.cat([base @ head_c[:, :d], z @ head_c[:, d:]], dim=1)
            ctx.save_for_backward(gx, torch.cat([base.t() @ x_c[:, :d], z.t() @ x_c[:, d:]], dim=1))
        ctx.mark_non_differentiable(row_ce, row_l1, row_soft)
        loss = (scale_ce * row_ce).sum() + (scale_l1 * row_l1).sum()
        if scale_soft is not None:
            loss = loss + (scale_soft * row_soft).sum()
        return loss, row_ce, row_l1, row_soft

    @staticmethod
    def backward(ctx, grad, _ce, _l1, _soft):
        gx, gh = ctx.saved_tensors
        return gx.float() * grad, gh.float() * grad, None, None, None, None, None, None, None, None


def block_acceptance(chance: Tensor, valid: Tensor) -> tuple[list[float], float]:
    """chance [N] of the valid slots, valid [..., G] -> (mean chance by position, expected tau).

    tau = mean over blocks with a valid slot of 1 + the sum over slots of the product of chances so far (invalid slots:
    0).
    """
    full = torch.zeros(valid.shape).masked_scatter(valid, chance).flatten(0, -2)
    flat = valid.flatten(0, -2)
    seen = flat.any(-1)
    by_position = full.sum(0) / flat.sum(0).clamp_min(1)
    tau = 1 + full[seen].cumprod(-1).sum(-1).mean() if bool(seen.any()) else torch.ones(())
    return [round(float(v), 4) for v in by_position], round(float(tau), 4)
