"""The reference's way to train, for comparison only: features of all data go to files first, training reads the files.

Knows: what DeepSpec's target cache holds for a sequence (ids, two masks, feature layers and last hidden state in bf16).
Refuses to know: how a step is made (the trainer's own is used), timing. One file a sequence here, shards and an index
there; a draft vocabulary that is trimmed also needs a float32 a token, kept beside so that nothing is computed again.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor
from pathlib import Path

from safetensors.torch import load, save_file

from training.data import Batch, TargetPass, TargetSide


class CachedPass:
    """Stands where the trainer has its target pass: gives a batch's features from the files under `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.files = folder, None

    def forget(self, which: object = None) -> None:
        """Files stay."""

    def write(self, target_pass: TargetPass, batches: list[Batch], workers: Executor) -> int:
        """Runs the target over all batches -> bytes written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return sum(workers.map(lambda batch: self._write(target_pass(batch), batch), batches))

    def _write(self, side: TargetSide, batch: Batch) -> int:
        written = 0
        for b, n in enumerate(batch.lengths):
            mask = batch.loss_mask[b, :n]
            tensors = {
                "input_ids": batch.tokens[b, :n].int(),
                "attention_mask": (mask | True).byte(),
                "loss_mask": mask.byte(),
                "target_hidden_states": side.features[b, :n],
                "target_last_hidden_states": side.last_hidden[b, :n],
            }
            if side.outside is not None:
                tensors["outside"] = side.outside[b, :n]
            file = self.file(batch, b)
            save_file({name: t.contiguous() for name, t in tensors.items()}, file)
            written += file.stat().st_size
        return written

    def file(self, batch: Batch, b: int) -> Path:
        """By the sequence's content."""
        content = batch.tokens[b, : batch.lengths[b]].numpy().tobytes() + batch.loss_mask[b].numpy().tobytes()
        return self.folder / f"{hashlib.sha256(content).hexdigest()[:20]}.safetensors"

    def __call__(self, batch: Batch, key: int | None = None) -> TargetSide:
        B, S = batch.tokens.shape
        rows = [load(self.file(batch, b).read_bytes()) for b in range(B)]

        def padded(name: str):
            out = rows[0][name].new_zeros((B, S, *rows[0][name].shape[1:]))
            for b, row in enumerate(rows):
                out[b, : batch.lengths[b]] = row[name]
            return out

        outside = padded("outside") if "outside" in rows[0] else None
        return TargetSide(padded("target_hidden_states"), padded("target_last_hidden_states"), outside)
