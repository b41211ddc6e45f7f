"""The shape of a decoder stack and its rotary embedding, read from a Hugging Face config.json.

Knows: config keys of both transformers generations, the families that this version reads, frequency scaling.
Refuses to know: weights, layers, drafts.

Legend: D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SUPPORTED_MODEL_TYPES = ("llama", "qwen3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding parameters: plain, or with the frequency scaling of Llama 3.1 ("llama3") or "linear"."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, raw: dict) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4)."""
        params = dict(raw.get("rope_scaling") or {})
        params.update(raw.get("rope_parameters") or {})
        rope_type = params.get("rope_type", params.get("type", "default"))
        if rope_type not in ("default", "llama3", "linear"):
            raise ValueError(f"rope_type is {rope_type!r}; this version reads 'default', 'linear' and 'llama3'.")
        return cls(
            theta=float(params.get("rope_theta", raw.get("rope_theta", 10000.0))),
            rope_type=rope_type,
            factor=float(params.get("factor", 1.0)),
            low_freq_factor=float(params.get("low_freq_factor", 1.0)),
            high_freq_factor=float(params.get("high_freq_factor", 4.0)),
            original_max_position_embeddings=int(params.get("original_max_position_embeddings", 8192)),
        )

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """[D/2] float32 inverse frequencies, scaled as the checkpoint says."""
        inv = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if self.rope_type == "linear":
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


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of one decoder stack (a target's, or a draft backbone's)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    qk_norm: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "llama"

    @classmethod
    def from_hf(cls, raw: dict, *, model_type: str | None = None) -> "DecoderConfig":
        """From a Hugging Face `config.json`. Raises ValueError for a family this version does not read."""
        model_type = model_type or raw.get("model_type", "")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(f"model_type is {model_type!r}; this version reads {', '.join(SUPPORTED_MODEL_TYPES)}.")
        if raw.get("use_sliding_window"):
            raise ValueError("use_sliding_window is true; sliding-window attention is not supported.")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act is {raw['hidden_act']!r}; this version computes 'silu'.")
        heads = int(raw["num_attention_heads"])
        return cls(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope=RopeConfig.from_hf(raw),
            max_position_embeddings=int(raw["max_position_embeddings"]),
            qk_norm=bool(raw.get("qk_norm", model_type == "qwen3")),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            model_type=model_type,
        )
