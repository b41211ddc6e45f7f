"""The rotary embedding's frequencies, read from a Hugging Face config.json.

Knows: the config keys of both transformers generations, frequency scaling. Refuses to know: decoders, weights.

Legend: D head size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "llama3", "proportional")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding parameters: plain, or with the frequency scaling of Llama 3.1 ("llama3"), "linear", or
    "proportional" (Gemma4: only the first rotated_share of a head's frequencies turn, the others stand still)."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    rotated_share: float = 1.0

    @classmethod
    def from_hf(cls, raw: dict) -> RopeConfig:
        """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4)."""
        params = dict(raw.get("rope_scaling") or {})
        params.update(raw.get("rope_parameters") or {})
        rope_type = params.get("rope_type", params.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {rope_type!r}; this version reads {', '.join(map(repr, ROPE_TYPES))}.")
        share = float(params.get("partial_rotary_factor", 1.0))
        if rope_type != "proportional" and share != 1.0:
            raise ValueError(
                f"partial_rotary_factor is {share} with rope_type {rope_type!r}; only 'proportional' may have one."
            )
        return cls(
            theta=float(params.get("rope_theta", raw.get("rope_theta", 10000.0))),
            rope_type=rope_type,
            factor=float(params.get("factor", 1.0)),
            low_freq_factor=float(params.get("low_freq_factor", 1.0)),
            high_freq_factor=float(params.get("high_freq_factor", 4.0)),
            original_max_position_embeddings=int(params.get("original_max_position_embeddings", 8192)),
            rotated_share=share,
        )

    def scaling(self) -> dict:
        """The parameters beside theta, under Hugging Face's names; {} where they are all the usual ones."""
        if self.rope_type == "default":
            return {}
        if self.rope_type == "proportional":
            return {"rope_type": self.rope_type, "factor": self.factor, "partial_rotary_factor": self.rotated_share}
        return {k: v for k, v in asdict(self).items() if k not in ("theta", "rotated_share")}

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """[D/2] float32 inverse frequencies, scaled as the checkpoint says; 0 = does not turn."""
        inv = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if self.rope_type == "linear":
            return inv / self.factor
        if self.rope_type == "proportional":
            inv[int(self.rotated_share * head_dim // 2) :] = 0
            return inv / self.factor
        if self.rope_type != "llama3":
            return inv
        wavelen = 2 * math.pi / inv
        low = self.original_max_position_embeddings / self.low_freq_factor
        high = self.original_max_position_embeddings / self.high_freq_factor
        smooth = (self.original_max_position_embeddings / wavelen - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        mixed = (1 - smooth) * inv / self.factor + smooth * inv
        return torch.where(wavelen > low, inv / self.factor, torch.where(wavelen < high, inv, mixed))

    def tables(self, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin tables, each [positions, D/2] float32: the same numbers the exported graph carries."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self.inverse_frequencies(head_dim)[None, :]
        return angles.cos(), angles.sin()
