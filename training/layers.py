"""Decoder layers of the Llama family and Qwen3, and the norm and rotation that every family shares.

Knows: a layer's mathematics and its Hugging Face weight names. Refuses to know: packing, caches, embeddings, heads.

The interface of every family's layer: `input_layernorm`; `self_attn` with queries, keys and values; `finish`, all that
comes behind attention. What is attended to, and how heads are turned, is the caller's affair, who asks
DecoderConfig.layer(i).

Legend: d hidden size, H / H_kv query / key-value heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.decoder_config import DecoderConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 whatever the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout. x [..., D]; cos, sin broadcastable to [..., D/2]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def scaled(x: Tensor, scale: float) -> Tensor:
    """Embeddings times a scale that is rounded to their own type, as such models were trained."""
    return x if scale == 1 else x * torch.tensor(scale, dtype=x.dtype)


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


class MLP(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class AttentionProjections(nn.Module):
    """q, k, v, o of one layer with the optional per-head norms of Qwen3; what is attended to is the caller's affair."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=c.attention_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def queries(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., H, D], normed, not yet rotated."""
        return self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)))

    def keys(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., H_kv, D], normed, not yet rotated."""
        return self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)))

    def values(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., H_kv, D]."""
        return self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))


class DecoderLayer(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.self_attn = AttentionProjections(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def finish(self, x: Tensor, attended: Tensor, own_input: Tensor | None = None) -> Tensor:
        """The residual stream x [..., d] behind this layer, from what its heads attended [..., H * D]. own_input: of
        families that have inputs of each layer's own."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))
