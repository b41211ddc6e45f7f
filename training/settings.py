"""What a training run depends on beside its data, one frozen dataclass.

Knows: defaults and what cannot be. Refuses to know: the models, the data, how a step is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.loss import LossWeights


@dataclass(frozen=True)
class TrainSettings:
    """Everything that a run depends on beside its data. Exactly one of steps and minutes is set."""

    seed: int = 1
    steps: int | None = None
    minutes: float | None = None
    lr: float = 1e-3
    final_lr: float = 0.02  # share of lr at the end of the cosine
    warmup: float = 0.04  # share of the run
    clip: float = 1.0
    tokens_per_batch: int = 768
    batches_per_step: int = 2  # each on a thread of its own: their gradients are averaged
    anchor_share: float = 0.5  # of the answer positions of a sequence, drawn anew each time it is seen
    max_length: int = 1024
    loss: LossWeights = LossWeights()
    bf16: bool = True
    feature_cache_gb: float = 8.0
    save_minutes: float = 5.0
    evaluate_steps: int = 250

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("name exactly one of steps and minutes.")
        if not 0 < self.anchor_share <= 1:
            raise ValueError(f"anchor_share is {self.anchor_share}; it must lie in (0, 1].")
