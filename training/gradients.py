"""The gradients of one step: of a draft that every process holds, or of one whose weights are sharded (FSDP2).

Knows: which process takes which batch, threads, where gradients are added up. Refuses to know: what a batch's losses
are (batch_pass.py), the optimiser, files.

Both put the mean over the step's batches into `.grad` and give back what the log says of each batch, in the step's
order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.batch_pass import BatchPass, Forward
from training.data import Batch
from training.loss import Losses
from training.ranks import Ranks
from training.seeds import generator_for

LOSSES = ("total", "ce", "l1", "confidence", "soft")


@dataclass(frozen=True)
class Job:
    """A batch of a step: its key (its features' name) and number (step and place in it), which seeds its anchors."""

    batch: Batch
    key: int
    number: int


@dataclass(frozen=True)
class Seen:
    """What the log says of one batch of a step: LOSSES, chance [N] of acceptance and valid [B*A, G] of its slots,
    counts."""

    losses: tuple[float, ...]
    chance: Tensor
    valid: Tensor
    blocks: int
    tokens: int


def seen_of(job: Job, f: Forward, losses: Losses, keep: Tensor) -> Seen:
    values = tuple(float(getattr(losses, name).detach()) for name in LOSSES)
    chance, valid = (1 - 0.5 * losses.row_l1).cpu(), f.valid.flatten(0, 1).cpu()
    return Seen(values, chance, valid, int(keep.sum()), int(job.batch.loss_mask.sum()))


class Replicated:
    """Every process holds the whole draft. A batch runs on one thread from end to end: two threads that met at every
    operation would wait for each other whenever the machine has other work. Gradients travel once a step."""

    together = False  # rank 0 evaluates alone

    def __init__(self, run: BatchPass, ranks: Ranks, seed: int, batches_per_step: int):
        self.run, self.ranks, self.seed = run, ranks, seed
        self.parameters = [p for p in run.draft.parameters() if p.requires_grad]
        ranks.like_first([p.data for p in self.parameters])
        cores = max(1, (os.cpu_count() or 1) // ranks.local_size)
        threads = min(-(-batches_per_step // ranks.size), cores) if run.device.type == "cpu" else 1
        self.workers = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, jobs: Sequence[Job]) -> list[Seen]:
        mine = list(self.workers.map(self.one, self.ranks.share(jobs)))
        sums = []
        for parts in zip(*(gradients for gradients, _ in mine)) if mine else [()] * len(self.parameters):
            present = [g for g in parts if g is not None]
            sums.append(sum(present[1:], start=present[0]) if present else None)
        for parameter, gradient in zip(self.parameters, self.ranks.total(sums, self.parameters)):
            parameter.grad = None if gradient is None else gradient.div_(len(jobs))
        return self.ranks.joined([seen for _, seen in mine])

    def one(self, job: Job) -> tuple[tuple[Tensor | None, ...], Seen]:
        """Forward and backward of a batch: the gradient of each parameter (None where unused)."""
        f, losses, keep = self.run(job.batch, job.key, generator_for(self.seed, "anchors", job.number))
        gradients = torch.autograd.grad(losses.total, self.parameters, allow_unused=True)
        return gradients, seen_of(job, f, losses, keep)

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter, or what the optimiser keeps of it, as a plain tensor."""
        return tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A plain tensor as this process keeps it."""
        return tensor

    def settle(self) -> None:
        """After an evaluation."""


class Sharded:
    """FSDP2: every process keeps 1/N of each trained weight, of its gradient and of the optimiser's state. The weights
    are gathered for a batch and dropped after it, all in one group: the draft is run through its parts, which leaves
    no layer whose call could be hooked.

    Every process must run as many batches: one without a share runs the step's first again, with weight 0.
    """

    together = True  # an evaluation gathers weights too: all ranks make it

    def __init__(self, run: BatchPass, ranks: Ranks, seed: int):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.ranks, self.seed, draft = ranks, seed, run.draft
        ranks.like_first([p.data for p in draft.parameters() if p.requires_grad])
        self.run = _Whole(run)
        mesh = init_device_mesh(run.device.type, (ranks.size,))
        frozen = {p for p in draft.parameters() if not p.requires_grad}
        fully_shard(self.run, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
        self.parameters = [p for p in draft.parameters() if p.requires_grad]
        self.workers = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, jobs: Sequence[Job]) -> list[Seen]:
        mine, size = self.ranks.share(jobs), self.ranks.size
        rounds, seen = -(-len(jobs) // size), []
        for i in range(rounds):
            job, own = (mine[i], 1.0) if i < len(mine) else (jobs[0], 0.0)
            self.run.set_requires_gradient_sync(i == rounds - 1)
            f, losses, keep = self.run(job.batch, job.key, generator_for(self.seed, "anchors", job.number))
            (losses.total * (own * size / len(jobs))).backward()  # FSDP2 divides by the number of ranks
            if own:
                seen.append(seen_of(job, f, losses, keep))
        return self.ranks.joined(seen)

    def whole(self, tensor: Tensor) -> Tensor:
        """Every rank must ask, in the same order."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        if not hasattr(like, "full_tensor"):
            return tensor
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)

    def settle(self) -> None:
        self.run.reshard()


class _Whole(nn.Module):
    """A batch pass as one module, whose call gathers the draft's weights."""

    def __init__(self, run: BatchPass):
        super().__init__()
        self.draft = run.draft
        self.inner = run

    def __getattr__(self, name: str) -> object:
        """What a module does not have is the batch pass's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["inner"], name)

    def forward(self, batch: Batch, key: int, generator: torch.Generator) -> tuple[Tensor, Forward, Losses, Tensor]:
        f, losses, keep = self.inner(batch, key, generator)
        return losses.total, f, losses, keep  # the first is what FSDP2 hooks its backward pass to

    def __call__(self, *arguments: object) -> tuple[Forward, Losses, Tensor]:
        return super().__call__(*arguments)[1:]
