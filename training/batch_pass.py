"""One batch through the frozen target and the draft: anchors drawn, blocks drafted, losses of the slots that count.

Knows: what the losses need of both models (paper, eq. 8-12). Refuses to know: gradients, optimisers, which batch comes
next. An autoregressive draft is trained by EAGLE-3's training-time test: the blocks of all anchors step by step, on the
recorded tokens and its own hidden states. It costs the keys and values of all S rows once, and as many rows of the
layers and of the head as a parallel draft with G = steps has, one step after the other.

Legend: B sequences, S positions, A anchors a sequence, G block size, N slots that count, U distinct target positions
among them, K = d + r, V_d draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.autoregressive import ArDraft
from training.data import Batch, TargetPass, TargetSide
from training.draft import DraftModel
from training.loss import Losses, block_losses, make_slots, target_rows
from training.settings import TrainSettings
from training.target import TargetModel


@dataclass(frozen=True)
class Forward:
    """N rows: x [N, K], head [V_d, K], confidence logits [N] or None, p [U, V_d+1], p_row [N], labels [N] (draft ids,
    -1 outside), slot [N]; valid [B, A, G] says where the rows lie."""

    x: Tensor
    head: Tensor
    confidence: Tensor | None
    p: Tensor
    p_row: Tensor
    labels: Tensor
    slot: Tensor
    valid: Tensor


class BatchPass:
    """Calling it gives a batch's rows, their losses and which anchors were kept ([B, A] bool)."""

    def __init__(
        self, target: TargetModel, draft: DraftModel | ArDraft, target_pass: TargetPass, settings: TrainSettings
    ):
        self.draft, self.target_pass, self.settings = draft, target_pass, settings
        self.device = target.lm_head.weight.device
        self.autoregressive = draft.config.kind != "parallel"
        ids = draft.draft_to_target()
        self.to_draft = torch.full((draft.config.decoder.vocab_size,), -1, dtype=torch.int64)
        self.to_draft[ids] = torch.arange(len(ids))
        dec = draft.config.decoder
        self.softcap = None if dec.logit_softcap is None else (dec.logit_softcap, dec.hidden_size)
        self.target_head, self.target_softcap = target.lm_head.weight[ids].float(), target.config.logit_softcap

    def __call__(self, batch: Batch, key: int, generator: torch.Generator) -> tuple[Forward, Losses, Tensor]:
        """`key` names the batch's features in the target pass's memory; `generator` draws the anchors."""
        anchors, keep = self.anchors(batch, generator)
        if self.device.type == "cpu":
            f = self.forward(batch, self.target_pass(batch, key), anchors, keep)
            return f, self.losses(f), keep
        with self.device:  # what either model or the losses create on their way lies there too
            batch, anchors, keep = batch.to(self.device), anchors.to(self.device), keep.to(self.device)
            f = self.forward(batch, self.target_pass(batch, key), anchors, keep)
            return f, self.losses(f), keep

    @property
    def slots(self) -> int:
        """How many slots of a block are run: G; in training of an autoregressive draft `unroll` (evaluation: all)."""
        G, unroll = self.draft.config.block_size, self.settings.unroll
        return min(unroll or G, G) if self.autoregressive and self.draft.training else G

    def anchors(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Positions [B, A] and keep [B, A]: anchor_share of each sequence's valid anchors, without replacement."""
        valid = batch.loss_mask.clone()
        valid[:, :-1] &= batch.loss_mask[:, 1:]
        valid[:, -1] = False
        if self.autoregressive:
            valid[:, 0] = False  # no row lies before it
        counts = (valid.sum(1) * self.settings.anchor_share).ceil().long()
        scores = torch.rand(valid.shape, generator=generator).masked_fill(~valid, -1.0)
        chosen = scores.topk(int(counts.max()), dim=1).indices
        return chosen, torch.arange(chosen.shape[1]) < counts[:, None]

    def forward(self, batch: Batch, side: TargetSide, anchors: Tensor, keep: Tensor) -> Forward:
        """The draft over all blocks of a batch: rows of the slots that count, and what the losses need of them."""
        draft, G = self.draft, self.slots
        slots = make_slots(batch.tokens, batch.loss_mask, anchors, keep, G)
        features = side.features if self.settings.bf16 else side.features.float()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bf16, cache_enabled=False):
            if self.autoregressive:
                hidden = draft.unroll(features, batch.tokens, anchors, G)
            else:
                hidden = draft.backbone(features, batch.tokens.gather(1, anchors), anchors, keep)
            embeddings = None
            head, x = draft.lm_head.weight, hidden
            if draft.markov_head is not None:
                embeddings = draft.markov_head.embed(slots.previous)
                latents = draft.markov_head.block_latents(embeddings, hidden)
                x = torch.cat([hidden, latents.to(hidden.dtype)], dim=-1)
                head = torch.cat([head, draft.markov_head.markov_w2.weight], dim=1)
        confidence = draft.confidence(hidden, embeddings)
        S = batch.tokens.shape[1]
        at = (slots.position + torch.arange(len(batch.tokens))[:, None, None] * S)[slots.valid]
        judged = torch.zeros(batch.tokens.numel(), dtype=torch.bool)
        judged[at] = True
        with torch.no_grad():
            outside = None if side.outside is None else side.outside.flatten()[judged]
            p = target_rows(side.last_hidden.flatten(0, 1)[judged], self.target_head, outside, self.target_softcap)
        return Forward(
            x[slots.valid], head, None if confidence is None else confidence[slots.valid], p,
            (judged.cumsum(0) - 1)[at], self.to_draft[slots.labels[slots.valid]], slots.valid.nonzero()[:, 2],
            slots.valid,
        )  # fmt: skip

    def losses(self, f: Forward) -> Losses:
        dtype = torch.bfloat16 if self.settings.bf16 else torch.float32
        G = self.draft.config.block_size
        rows = f.x, f.head, f.confidence, f.p, f.p_row, f.labels, f.slot
        return block_losses(*rows, self.settings.loss, G, dtype, self.softcap)
