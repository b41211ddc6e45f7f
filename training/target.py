"""Target models (Llama family, Qwen3) in the packed-token form that the compiled engine has.

Knows: the decoder's mathematics and its Hugging Face weight names. Refuses to know: drafts, losses, ONNX.

Legend: N packed tokens of all requests, R requests, Q padded query slots a request, C cache positions attended,
M rows that need logits, V vocabulary, d hidden size, H / H_kv query / key-value heads, D head size, L feature layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.decoder_config import DecoderConfig
from training.weights import StoredTensor, load_exactly, stored_tensors

TIED = "lm_head.weight"  # the tensor that a tied target lacks


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


@dataclass(frozen=True)
class PackedBatch:
    """One pass over packed tokens.

    token_ids [N], pad_index [R, Q] (packed row of each padded slot, 0 where empty), pack_index [N] (r * Q + j),
    position_ids [R, Q], write_index [R] (cache position of slot 0), all int64; mask [R, 1, Q, C] bool, True = attend.
    """

    token_ids: Tensor
    pad_index: Tensor
    pack_index: Tensor
    position_ids: Tensor
    write_index: Tensor
    mask: Tensor

    @classmethod
    def build(cls, tokens: list[list[int]], lengths: list[int], cache_len: int) -> "PackedBatch":
        """Packs `tokens[r]` behind `lengths[r]` cached positions; C = cache_len. Padded slots attend position 0."""
        counts = [len(t) for t in tokens]
        R, Q = len(tokens), max(counts)
        pad = torch.zeros(R, Q, dtype=torch.int64)
        pack, row = [], 0
        for r, n in enumerate(counts):
            pad[r, :n] = torch.arange(row, row + n)
            pack.append(torch.arange(n) + r * Q)
            row += n
        start = torch.tensor(lengths, dtype=torch.int64)
        positions = start[:, None] + torch.arange(Q)[None, :]
        visible = torch.arange(cache_len)[None, None, :] <= positions[:, :, None]
        return cls(
            token_ids=torch.tensor([t for seq in tokens for t in seq], dtype=torch.int64),
            pad_index=pad,
            pack_index=torch.cat(pack),
            position_ids=positions,
            write_index=start,
            mask=visible[:, None],
        )


@dataclass(frozen=True)
class TargetOutput:
    """logits [M, V], features [N, L * d] (layer outputs in layer_ids order), last_hidden [N, d] (after the final
    norm)."""

    logits: Tensor
    features: Tensor
    last_hidden: Tensor


class TargetModel(nn.Module):
    """A decoder-only target. Weight names are those of the Hugging Face checkpoint without the `model.` prefix."""

    def __init__(self, config: DecoderConfig, layer_ids: tuple[int, ...] = ()):
        super().__init__()
        self.config = config
        self.layer_ids = tuple(layer_ids)
        check_layer_ids(self.layer_ids, config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._rope: tuple[Tensor, Tensor] | None = None

    def rope_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos, sin [>= positions, D/2] float32, computed once and grown when a longer context comes."""
        if self._rope is None or self._rope[0].shape[0] < positions:
            self._rope = self.config.rope.tables(self.config.head_dim, max(positions, 512))
        return self._rope

    def new_caches(self, R: int, S: int) -> list[tuple[Tensor, Tensor]]:
        """Per layer, key and value caches [R, H_kv, S, D] of zeros in the weights' dtype."""
        shape = (R, self.config.num_key_value_heads, S, self.config.head_dim)
        weight = self.embed_tokens.weight
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers]

    def forward(
        self, batch: PackedBatch, logit_rows: Tensor, caches: list[tuple[Tensor, Tensor]] | None = None
    ) -> TargetOutput:
        """One packed pass. With caches, keys and values are written in place at write_index and C positions of the
        cache are attended; without, the batch is self-contained (write_index all 0, C = Q)."""
        cos, sin = self.rope_tables(int(batch.position_ids.max()) + 1)
        cos, sin = cos[batch.position_ids][:, :, None], sin[batch.position_ids][:, :, None]
        slots = batch.write_index[:, None] + torch.arange(batch.position_ids.shape[1])
        x = self.embed_tokens(batch.token_ids)
        features = {-1: x}
        for i, layer in enumerate(self.layers):
            h = layer.input_layernorm(x)
            attn = layer.self_attn
            q = rotate(attn.queries(h)[batch.pad_index], cos, sin).transpose(1, 2)
            k = rotate(attn.keys(h)[batch.pad_index], cos, sin).transpose(1, 2)
            v = attn.values(h)[batch.pad_index].transpose(1, 2)
            if caches is not None:
                C = batch.mask.shape[-1]
                k, v = (self._write(cache, new, slots)[:, :, :C] for cache, new in zip(caches[i], (k, v)))
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask, enable_gqa=True)
            o = o.transpose(1, 2).flatten(2).flatten(0, 1)[batch.pack_index]
            x = x + attn.o_proj(o)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if i in self.layer_ids:
                features[i] = x
        last = self.norm(x)
        feats = torch.cat([features[i] for i in self.layer_ids], dim=-1) if self.layer_ids else x[:, :0]
        return TargetOutput(self.lm_head(last[logit_rows]), feats, last)

    @staticmethod
    def _write(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
        """cache [R, H_kv, S, D] <- new [R, H_kv, Q, D] at slots [R, Q]; in place."""
        cache[torch.arange(cache.shape[0])[:, None], :, slots] = new.transpose(1, 2)
        return cache

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, layer_ids: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> "TargetModel":
        """Loads a Hugging Face folder (config.json + *.safetensors).

        Raises FileNotFoundError without either, ValueError when a weight is missing, unused or of another shape.
        """
        folder = Path(folder)
        config = DecoderConfig.from_hf(json.loads((folder / "config.json").read_text()))
        with torch.device("meta"):
            model = cls(config, layer_ids)
        stored = target_tensors(folder, config)
        loaded = {t: t.load().to(dtype) for t in set(stored.values())}  # what is tied once
        load_exactly(model, {name: loaded[t] for name, t in stored.items()}, str(folder))
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model.eval().requires_grad_(False)


def target_tensors(folder: Path, config: DecoderConfig) -> dict[str, StoredTensor]:
    """The checkpoint's tensors, unread, under TargetModel's names; a tied lm_head is the embedding.

    Raises FileNotFoundError when there is no *.safetensors file."""
    state = {name.removeprefix("model."): t for name, t in stored_tensors(folder).items()}
    if config.tie_word_embeddings:
        state.pop(TIED, None)
        if "embed_tokens.weight" in state:  # where it is missing, check_fit says so
            state[TIED] = state["embed_tokens.weight"]
    return state


def check_layer_ids(layer_ids: tuple[int, ...], num_layers: int) -> None:
    """-1 is the embedding output, k the output of decoder layer k.

    Raises ValueError unless they increase strictly and lie in range."""
    if list(layer_ids) != sorted(set(layer_ids)) or any(not -1 <= i < num_layers for i in layer_ids):
        raise ValueError(
            f"target_layer_ids is {list(layer_ids)}; they must increase strictly and lie in -1..{num_layers - 1}."
        )
