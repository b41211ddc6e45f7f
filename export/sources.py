"""The two checkpoints of a bundle as graphs take them: config, and weights that are read when they are written.

Knows: which tensors a TargetModel and a DraftModel have. Refuses to know: ONNX, precision, how a model computes.
Each has what a builder asks a model for (config, state_dict, ...), so that a loaded model may stand in its place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.autoregressive import ArConfig
from training.checkpoint import draft_module, draft_tensors
from training.decoder_config import DecoderConfig
from training.draft import DraftConfig
from training.target import TargetModel, target_tensors
from training.weights import StoredTensor, check_fit

from .arrays import Lazy


@dataclass(frozen=True)
class TargetSource:
    """A target's weights under TargetModel's names, float32 once made. layer_ids: its feature layers."""

    config: DecoderConfig
    layer_ids: tuple[int, ...]
    weights: dict[str, Lazy]

    def state_dict(self) -> dict[str, Lazy]:
        return self.weights

    @classmethod
    def open(cls, folder: Path, layer_ids: tuple[int, ...]) -> TargetSource:
        """Reads names and shapes. Errors as of TargetModel.from_pretrained."""
        config = DecoderConfig.from_hf(json.loads((folder / "config.json").read_text()))
        stored = target_tensors(folder, config)
        with torch.device("meta"):
            model = TargetModel(config, layer_ids)
        check_fit(model.state_dict(), stored, str(folder))
        return cls(config, tuple(layer_ids), {name: lazy(stored[name]) for name in model.state_dict()})


@dataclass(frozen=True)
class DraftSource:
    """A draft's weights under the names of its module (DraftModel, ArDraft), float32 (d2t int64) once made."""

    config: DraftConfig | ArConfig
    weights: dict[str, Lazy]

    def state_dict(self) -> dict[str, Lazy]:
        return self.weights

    def draft_to_target(self) -> Tensor:
        """[V_d] int64: the target id of each draft token."""
        ids = torch.arange(self.config.vocab_out)
        return ids + torch.from_numpy(np.asarray(self.weights["d2t"])) if "d2t" in self.weights else ids

    @classmethod
    def open(cls, folder: Path, target_folder: Path) -> DraftSource:
        """Reads names and shapes. Errors as of load_draft."""
        config, stored = draft_tensors(folder, target_folder)
        with torch.device("meta"):
            model = draft_module(config)
        check_fit(model.state_dict(), stored, str(folder))
        return cls(config, {name: lazy(stored[name]) for name in model.state_dict()})


def lazy(stored: StoredTensor) -> Lazy:
    return Lazy(stored.shape, np.int64 if stored.whole_numbers else np.float32, lambda: stored.numbers().numpy())
