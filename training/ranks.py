"""The processes of one run (torchrun): who takes which batch, and what they tell each other.

Knows: torch.distributed, the variables that torchrun sets. Refuses to know: models, losses, files. Alone, a run is rank 0
of 1 and every call gives back what it was given. Gradients travel once a step, as one float32 vector (sharded weights:
gradients.py); by gloo between CPUs, by NCCL between GPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """`rank` of `size` processes, `local_size` of them on this machine. Every rank makes the same calls in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1):
        self.rank, self.size, self.local_size = rank, size, local_size

    @classmethod
    def join(cls, device: str = "cpu") -> Ranks:
        """As torchrun says; without it, alone. device cuda: every process of a machine takes the GPU of its number.
        Raises ValueError when there is no such GPU."""
        number = lambda name, default: int(os.environ.get(name, default))
        size = number("WORLD_SIZE", 1)
        if device == "cuda":
            gpus, mine = torch.cuda.device_count(), number("LOCAL_RANK", 0)
            if mine >= gpus:
                raise ValueError(f"device is 'cuda'; process {mine} of this machine finds {gpus} GPUs.")
            torch.cuda.set_device(mine)
        if size > 1 and not dist.is_initialized():
            # Its functions have the group of the moment they are imported as a default: imported later, as transformers
            # does, they would keep it, and its threads, past leave().
            from torch.distributed import nn  # noqa: F401

            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        return cls(number("RANK", 0), size, number("LOCAL_WORLD_SIZE", size))

    def leave(self) -> None:
        """Ends the group's threads too: one that gives back a tensor while Python ends would abort the process. FSDP2 keeps
        its group, and so its threads, for good; they get time to give back what they hold."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(0.2)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's: every size-th, from its own number on."""
        return list(items[self.rank :: self.size])

    def joined(self, mine: list[T]) -> list[T]:
        """What all ranks have made of their shares, in the order of the whole."""
        if self.size == 1:
            return mine
        parts = self.gather(mine)
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def gather(self, mine: T) -> list[T]:
        """Every rank's, by rank."""
        if self.size == 1:
            return [mine]
        parts: list = [None] * self.size
        dist.all_gather_object(parts, mine)
        return parts

    def from_first(self, make: Callable[[], T]) -> T:
        """make() of rank 0, for all: files are read once, and nobody sees them at another moment."""
        if self.size == 1:
            return make()
        made = [make() if self.first else None]
        dist.broadcast_object_list(made, 0)
        return made[0]

    def like_first(self, tensors: Sequence[Tensor]) -> None:
        """Sets the tensors to rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def total(self, parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums over all ranks of `parts` (None: nothing to add; None again where nobody adds), each shaped `like`."""
        if self.size == 1:
            return list(parts)
        there = torch.tensor([float(part is not None) for part in parts], device=like[0].device)
        flat = torch.cat([(torch.zeros_like(x) if p is None else p).flatten() for p, x in zip(parts, like)] + [there])
        dist.all_reduce(flat)
        *sums, there = flat.split([*(x.numel() for x in like), len(parts)])
        return [s.view_as(x) if n else None for s, x, n in zip(sums, like, there.tolist())]
