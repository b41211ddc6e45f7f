"""The held-out slice of a run: chosen from the held-out sequences, evaluated the same way every time.

Knows: which batches it is made of, what is measured on them. Refuses to know: the optimiser, where the figures go.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from training.batch_pass import BatchPass
from training.data import Batch, Sequence, make_batches, sequence_key
from training.loss import block_acceptance, row_logits
from training.seeds import generator_for
from training.settings import TrainSettings

EVALUATION_TOKENS = 12_288  # of the held-out sequences, at most


@dataclass(frozen=True)
class BatchEvaluation:
    """losses [5] (total, ce, l1, confidence, soft), chance [N] and valid [B*A, G] of the slots, greedy [blocks, G]
    bool: hits."""

    losses: Tensor
    chance: Tensor
    valid: Tensor
    greedy: Tensor


class HeldOut:
    """`keys`: of all held-out sequences; `batches`: those that are evaluated. Keys of their features are negative."""

    def __init__(self, settings: TrainSettings):
        self.settings = settings
        self.batches: list[Batch] = []
        self.keys: list[str] = []

    def choose(self, sequences: list[Sequence]) -> bool:
        """Chooses the slice that is evaluated. False: the sequences are the same as before."""
        s, keys = self.settings, [sequence_key(x) for x in sequences]
        if keys == self.keys:
            return False
        held = make_batches(sequences, s.tokens_per_batch, s.max_length)
        order = torch.randperm(len(held), generator=generator_for(s.seed, "held-out", 0)).tolist()
        self.batches = [held[i] for i in order[: max(1, EVALUATION_TOKENS // s.tokens_per_batch)]]
        self.keys = keys
        return True

    @torch.no_grad()
    def evaluate(self, run: BatchPass, workers: ThreadPoolExecutor) -> dict:
        """Losses, acceptance by position and tau on the held-out slice, the same blocks every time.

        greedy_tau: teacher-forced on recorded answers that the target itself would choose (95% of their tokens are its
        argmax): 1 + how many slots from the first on have the recorded token as the draft's argmax.
        """
        if not self.batches:
            return {}
        run.draft.eval()
        parts = list(workers.map(lambda i: self.evaluate_batch(run, i), range(len(self.batches))))
        sums = sum(p.losses for p in parts)
        hits = torch.cat([p.greedy for p in parts])
        chances, valids = torch.cat([p.chance for p in parts]), torch.cat([p.valid for p in parts])
        run.draft.train()
        chance, tau = block_acceptance(chances, valids)
        line = {k: round(float(v), 5) for k, v in zip(("total", "ce", "l1", "confidence", "soft"), sums / len(parts))}
        greedy_tau = 1 + float(hits.int().cumprod(-1).sum(-1).float().mean()) if len(hits) else None
        return {**line, "acceptance": chance, "tau": tau, "greedy_tau": greedy_tau, "greedy_blocks": len(hits),
                "blocks": int(valids.any(-1).sum())}  # fmt: skip

    @torch.no_grad()
    def evaluate_batch(self, run: BatchPass, i: int) -> BatchEvaluation:
        f, losses, _ = run(self.batches[i], -1 - i, generator_for(self.settings.seed, "evaluate", i))
        hit = torch.cat([row_logits(x.float(), f.head.float(), run.softcap).argmax(-1) for x in f.x.split(256)]) == f.labels
        chosen = (f.p.argmax(-1)[f.p_row] == f.labels) | (f.labels < 0)
        per_row = lambda x: torch.zeros_like(f.valid, dtype=torch.float32).masked_scatter(f.valid, x.float())
        is_greedy = per_row(chosen).sum((1, 2)) >= 0.95 * f.valid.sum((1, 2))
        return BatchEvaluation(
            torch.stack([losses.total, losses.ce, losses.l1, losses.confidence, losses.soft]).cpu(),
            (1 - 0.5 * losses.row_l1).cpu(),
            f.valid.flatten(0, 1).cpu(),
            per_row(hit)[f.valid[..., -1] & is_greedy[:, None]].bool().cpu(),
        )
