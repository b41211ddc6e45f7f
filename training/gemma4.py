"""Decoder layers of Gemma4 (text): norms on both sides of attention and MLP, normed values, inputs of each layer's own.

Knows: a layer's mathematics and its Hugging Face weight names. Refuses to know: packing, caches, embeddings, heads.
The interface is that of training/layers.py.

Legend: N tokens, d hidden size, H / H_kv query / key-value heads, D head size, L layers, p width of a layer's own
input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.decoder_config import DecoderConfig, LayerShape
from training.layers import RMSNorm


class Gemma4Attention(nn.Module):
    """q, k, v, o of one layer. Values are normed without a weight; a layer that shares has no keys and values."""

    def __init__(self, c: DecoderConfig, shape: LayerShape, shares: bool):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.eps = c.rms_norm_eps
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.head_dim, bias=c.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, self.eps)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=c.attention_bias)
        self.v_proj = None
        if shares:
            return
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.attention_bias)
        self.k_norm = RMSNorm(self.head_dim, self.eps)
        if shape.own_values:
            self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.attention_bias)

    def queries(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., H, D], normed, not yet rotated."""
        return self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)))

    def keys(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., H_kv, D], normed, not yet rotated."""
        return self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)))

    def values(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., H_kv, D], normed."""
        v = (self.v_proj or self.k_proj)(x).unflatten(-1, (self.kv_heads, self.head_dim))
        return F.rms_norm(v.float(), v.shape[-1:], None, self.eps).to(v.dtype)


class Gemma4MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))


class Gemma4Layer(nn.Module):
    """`layer_scalar` [1]: a number of the checkpoint that is not trained."""

    def __init__(self, c: DecoderConfig, i: int):
        super().__init__()
        shape, d, eps = c.layer(i), c.hidden_size, c.rms_norm_eps
        self.self_attn = Gemma4Attention(c, shape, shares=shape.source != i)
        self.mlp = Gemma4MLP(d, shape.intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.register_buffer("layer_scalar", torch.ones(1))
        if p := c.gemma4.per_layer_size:
            self.per_layer_input_gate = nn.Linear(d, p, bias=False)
            self.per_layer_projection = nn.Linear(p, d, bias=False)
            self.post_per_layer_input_norm = RMSNorm(d, eps)

    def finish(self, x: Tensor, attended: Tensor, own_input: Tensor | None = None) -> Tensor:
        """As DecoderLayer.finish; own_input [..., p] where the model has inputs of each layer's own."""
        x = x + self.post_attention_layernorm(self.self_attn.o_proj(attended))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        if own_input is not None:
            gated = gelu(self.per_layer_input_gate(x)) * own_input
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar.to(x.dtype)


def add_layer_inputs(model: nn.Module, c: DecoderConfig) -> None:
    """Gives a model what `layer_inputs` reads: a table of the tokens, and a projection of their embeddings."""
    p, L = c.gemma4.per_layer_size, c.num_hidden_layers
    model.embed_tokens_per_layer = nn.Embedding(c.vocab_size, L * p)
    model.per_layer_model_projection = nn.Linear(c.hidden_size, L * p, bias=False)
    model.per_layer_projection_norm = RMSNorm(p, c.rms_norm_eps)


def layer_inputs(model: nn.Module, c: DecoderConfig, ids: Tensor, x: Tensor) -> Tensor:
    """The inputs of each layer's own: ids [N], their scaled embeddings x [N, d] -> [N, L, p]."""
    p = c.gemma4.per_layer_size
    tokens = model.embed_tokens_per_layer(ids) * torch.tensor(p**0.5, dtype=x.dtype)
    context = (model.per_layer_model_projection(x) * c.hidden_size**-0.5).unflatten(-1, (-1, p))
    return (model.per_layer_projection_norm(context) + tokens.unflatten(-1, (-1, p))) * 2**-0.5


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")

