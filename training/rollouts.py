"""Recorded rounds of a draft: the npz of `python -m decoding record`, read and checked.

Knows: its arrays and what cannot be. Refuses to know: how it was made, what is concluded from it (calibrate.py).
Legend: B rounds, G block size (slots of a round).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy import ndarray

KINDS_ARRAYS = {
    "confidence_logits": (2, "f"), "accepted": (1, "iu"), "temperature": (1, "f"), "request": (1, "iu"),
    "position": (1, "iu"), "kind": (1, "U"), "meta": (0, "U"),
}  # fmt: skip


@dataclass(frozen=True)
class Rollouts:
    """Recorded rounds: logits [B, G] float64 (raw confidence logits z), accepted [B] (leading accepted tokens of a fully
    verified block), temperature [B] (0 = greedy), request [B] (which request a round belongs to), meta: what record
    wrote about the bundle, kind [B] of prompt."""

    logits: ndarray
    accepted: ndarray
    temperature: ndarray
    request: ndarray
    meta: dict
    kind: ndarray

    def __len__(self) -> int:
        return len(self.accepted)

    @property
    def survived(self) -> ndarray:
        """[B, G] bool: the first k + 1 tokens of the block were all accepted."""
        return self.accepted[:, None] > np.arange(self.logits.shape[1])

    def where(self, mask: ndarray) -> Rollouts:
        """The rounds of a [B] bool mask."""
        arrays = (self.logits, self.accepted, self.temperature, self.request)
        return Rollouts(*(a[mask] for a in arrays), self.meta, self.kind[mask])


def read_rollouts(file: str | Path) -> Rollouts:
    """Reads the npz of `python -m decoding record`. Raises ValueError (one sentence) for what does not fit, and
    FileNotFoundError."""
    try:
        with np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, TypeError, AttributeError, BadZipFile) as error:  # all that numpy may raise
        raise ValueError(
            f"{file} is not an npz of rollouts ({error}); make one with python -m decoding record."
        ) from None
    for name, (rank, kinds) in KINDS_ARRAYS.items():
        if name not in arrays:
            raise ValueError(f"{file} holds no {name!r}; make it again with python -m decoding record.")
        if arrays[name].ndim != rank or arrays[name].dtype.kind not in kinds:
            raise ValueError(
                f"{file}: {name} is {arrays[name].dtype} of rank {arrays[name].ndim}, it must be of rank {rank}."
            )
    logits, accepted = arrays["confidence_logits"].astype(np.float64), arrays["accepted"].astype(np.int64)
    lengths = {name: len(arrays[name]) for name, (rank, _) in KINDS_ARRAYS.items() if rank}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{file}: its arrays have different lengths ({lengths}).")
    if not np.isfinite(logits).all():
        raise ValueError(
            f"{file}: confidence_logits holds {logits[~np.isfinite(logits)][0]}; every logit must be finite."
        )
    G = logits.shape[1]
    if len(accepted) and not 0 <= accepted.min() <= accepted.max() <= G:
        raise ValueError(f"{file}: accepted lies in {accepted.min()}..{accepted.max()}; it must lie in 0..{G}.")
    if len(accepted) and (arrays["temperature"] < 0).any():
        raise ValueError(f"{file}: temperature holds {arrays['temperature'].min()}; it must be 0 or more.")
    try:
        meta = json.loads(str(arrays["meta"]))
        hashes = [meta[key] for key in ("draft_hash", "target_hash")]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: its meta lacks draft_hash or target_hash ({error}); record it again.") from None
    if not all(isinstance(h, str) and h for h in hashes):
        raise ValueError(f"{file}: draft_hash is {hashes[0]!r} and target_hash {hashes[1]!r}; both must be texts.")
    temperature, request = arrays["temperature"].astype(np.float64), arrays["request"].astype(np.int64)
    return Rollouts(logits, accepted, temperature, request, meta, arrays["kind"])
