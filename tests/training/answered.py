"""Generated sequences as the trainer reads them, and the settings of a tiny run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.initialisation import HeadShape
from training.settings import TrainSettings

SETTINGS = TrainSettings(steps=12, lr=3e-3, tokens_per_batch=200, bf16=False, evaluate_steps=6, save_minutes=1e9)
SHAPE = HeadShape(depth=1, block_size=4, rank=8, mask_token_id=3, draft_vocab=0)


@dataclass(frozen=True)
class Answered:
    tokens: np.ndarray
    prompt_length: int
