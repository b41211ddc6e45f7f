"""What a training run depends on beside its data, one frozen dataclass.

Knows: defaults and what cannot be. Refuses to know: the models, the data, how a step is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.loss import LossWeights
from training.optimiser import OPTIMISERS

DEVICES = ("cpu", "cuda")
SHARDINGS = ("ddp", "fsdp2")
FREE = (  # a resumed run may have others: they change no step, or none beyond the order of its sums
    "feature_cache_gb", "feature_disk_gb", "feature_folder", "save_minutes", "evaluate_steps", "patience",
    "tensorboard", "compile", "device", "sharding",
)  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """Everything that a run depends on beside its data. Exactly one of steps and minutes is set."""

    seed: int = 1
    steps: int | None = None
    minutes: float | None = None
    optimiser: str = "adamw"
    lr: float = 1e-3
    final_lr: float = 0.02  # share of lr at the end of the cosine
    warmup: float = 0.04  # share of the run
    clip: float = 1.0
    tokens_per_batch: int = 768
    batches_per_step: int = 2  # each on a thread of its own: their gradients are averaged
    anchor_share: float = 0.5  # of the answer positions of a sequence, drawn anew each time it is seen
    max_length: int = 1024
    loss: LossWeights = LossWeights()
    unroll: int = 0  # steps of an autoregressive draft's training; 0 is block_size
    bf16: bool = True
    feature_cache_gb: float = 8.0
    save_minutes: float = 5.0
    evaluate_steps: int = 250
    ema: float = 0.0  # decay of the running mean of the weights; 0 keeps none
    patience: int = 0  # evaluations without a better held-out tau after which the run ends; 0 never
    feature_disk_gb: float = 0.0  # files for the features that the memory has no room for
    feature_folder: str | None = None  # of those files; None is the run's
    tensorboard: bool = False
    compile: bool = False  # the draft's backbone by torch.compile
    device: str = "cpu"
    sharding: str = "ddp"  # of the draft's weights, with several processes
    draft_vocab_add: int = 0  # answer tokens that the --init head could not draft, added to its vocabulary

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("name exactly one of steps and minutes.")
        if not 0 < self.anchor_share <= 1:
            raise ValueError(f"anchor_share is {self.anchor_share}; it must lie in (0, 1].")
        if self.unroll < 0:
            raise ValueError(f"unroll is {self.unroll}; it must be 0 (the block's size) or more.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must lie in [0, 1).")
        if self.patience < 0:
            raise ValueError(f"patience is {self.patience}; it must be 0 (off) or more.")
        if self.draft_vocab_add < 0:
            raise ValueError(f"draft_vocab_add is {self.draft_vocab_add}; it must be 0 or more.")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}; it must be one of {', '.join(DEVICES)}.")
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser is {self.optimiser!r}; it must be one of {', '.join(OPTIMISERS)}.")
        if self.optimiser == "muon" and self.sharding == "fsdp2":
            raise ValueError("optimiser is 'muon' and sharding 'fsdp2'; Muon needs whole matrices: use ddp, or adamw.")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding is {self.sharding!r}; it must be one of {', '.join(SHARDINGS)}.")
