"""Target models (Llama family, Qwen3, Gemma4's text) in the packed-token form that the compiled engine has.

Knows: the stack, its caches and its Hugging Face weight names. Refuses to know: what a layer computes behind attention
(layers.py, gemma4.py), drafts, losses, ONNX.

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

from training.decoder_config import DecoderConfig, LayerShape
from training.families import decoder_layer
from training.gemma4 import add_layer_inputs, layer_inputs
from training.layers import MLP, AttentionProjections, DecoderLayer, RMSNorm, rotate, scaled, softcapped
from training.weights import StoredTensor, load_exactly, stored_tensors

__all__ = ["MLP", "AttentionProjections", "DecoderLayer", "PackedBatch", "RMSNorm", "TargetModel", "rotate"]
TIED = "lm_head.weight"  # the tensor that a tied target lacks
PREFIXES = ("model.language_model.", "language_model.model.", "model.")  # of a text model's names
OTHER_SENSES = ("vision", "audio", "multi_modal", "embed_vision", "embed_audio")  # of a checkpoint with more than text


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
        self.layers = nn.ModuleList(decoder_layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if has_layer_inputs(config):
            add_layer_inputs(self, config)
        self.shapes = config.layers
        self._rope: dict[tuple, tuple[Tensor, Tensor]] = {}

    def rope_tables(self, positions: int, shape: LayerShape) -> tuple[Tensor, Tensor]:
        """A layer's cos, sin [>= positions, D/2] float32, computed once and grown when a longer context comes."""
        key = shape.rope, shape.head_dim
        if key not in self._rope or self._rope[key][0].shape[0] < positions:
            self._rope[key] = shape.rope.tables(shape.head_dim, max(positions, 512))
        return self._rope[key]

    def new_caches(self, R: int, S: int) -> list[tuple[Tensor, Tensor]]:
        """For each layer that keeps its own, key and value caches [R, H_kv, S, D] of zeros in the weights' dtype."""
        weight = self.embed_tokens.weight
        shapes = [(R, s.num_key_value_heads, S, s.head_dim) for s in self.config.cached_layers]
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for shape in shapes]

    def embed(self, ids: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """ids [N] -> the first layer's input [N, d], and each layer's own input [N, p] or None."""
        x = scaled(self.embed_tokens(ids), self.config.embed_scale)
        if not has_layer_inputs(self.config):
            return x, [None] * len(self.layers)
        return x, list(layer_inputs(self, self.config, ids, x).unbind(1))

    def head(self, last: Tensor) -> Tensor:
        """Normed hidden states [..., d] -> logits [..., V]."""
        return softcapped(self.lm_head(last), self.config.logit_softcap)

    def forward(
        self, batch: PackedBatch, logit_rows: Tensor, caches: list[tuple[Tensor, Tensor]] | None = None
    ) -> TargetOutput:
        """One packed pass. With caches, keys and values are written in place at write_index and C positions of the
        cache are attended; without, the batch is self-contained (write_index all 0, C = Q)."""
        positions, pad = batch.position_ids, batch.pad_index
        masks = {s.window: within(batch.mask, positions, s.window) for s in self.shapes}
        turns = {}
        for s in self.shapes:
            tables = self.rope_tables(int(positions.max()) + 1, s)
            turns[s.rope, s.head_dim] = [table[positions][:, :, None] for table in tables]
        slots = batch.write_index[:, None] + torch.arange(positions.shape[1], device=positions.device)
        x, own = self.embed(batch.token_ids)
        features, kept = {-1: x}, {}
        for i, (layer, s) in enumerate(zip(self.layers, self.shapes)):
            h, attn, turn = layer.input_layernorm(x), layer.self_attn, turns[s.rope, s.head_dim]
            q = rotate(attn.queries(h)[pad], *turn).transpose(1, 2)
            if s.source == i:
                k, v = rotate(attn.keys(h)[pad], *turn).transpose(1, 2), attn.values(h)[pad].transpose(1, 2)
                if caches is not None:
                    C = batch.mask.shape[-1]
                    k, v = (self._write(cache, new, slots)[:, :, :C] for cache, new in zip(caches[i], (k, v)))
                kept[i] = k, v
            mask, scale = masks[s.window], s.attention_scale
            o = F.scaled_dot_product_attention(q, *kept[s.source], attn_mask=mask, scale=scale, enable_gqa=True)
            x = layer.finish(x, o.transpose(1, 2).flatten(2).flatten(0, 1)[batch.pack_index], own[i])
            if i in self.layer_ids:
                features[i] = x
        last = self.norm(x)
        feats = torch.cat([features[i] for i in self.layer_ids], dim=-1) if self.layer_ids else x[:, :0]
        return TargetOutput(self.head(last[logit_rows]), feats, last)

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
    state = {bare(name): t for name, t in stored_tensors(folder).items()}
    if config.gemma4:
        state = {name: t for name, t in state.items() if not is_spare(name, config)}
    if config.tie_word_embeddings:
        state.pop(TIED, None)
        if "embed_tokens.weight" in state:  # where it is missing, check_fit says so
            state[TIED] = state["embed_tokens.weight"]
    return state


def bare(name: str) -> str:
    """A tensor's name without what a checkpoint puts before its text model's."""
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    return name.removeprefix(prefix)


def is_spare(name: str, config: DecoderConfig) -> bool:
    """Whether a Gemma4 checkpoint's tensor is of pictures or sound, or makes keys and values in a layer that shares."""
    if name.startswith(OTHER_SENSES):
        return True
    part = name.split(".")
    shares = part[0] == "layers" and config.layer(int(part[1])).source != int(part[1])
    return shares and part[-2] in ("k_proj", "v_proj", "k_norm", "v_norm")


def has_layer_inputs(config: DecoderConfig) -> bool:
    return config.gemma4 is not None and config.gemma4.per_layer_size > 0


def within(mask: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """mask [R, 1, Q, C] bool, without the cache positions (their index) that lie `window` or more before a query's."""
    if window is None:
        return mask
    return mask & (positions[:, None, :, None] - torch.arange(mask.shape[-1], device=mask.device) < window)


def check_layer_ids(layer_ids: tuple[int, ...], num_layers: int) -> None:
    """-1 is the embedding output, k the output of decoder layer k.

    Raises ValueError unless they increase strictly and lie in range."""
    if list(layer_ids) != sorted(set(layer_ids)) or any(not -1 <= i < num_layers for i in layer_ids):
        raise ValueError(
            f"target_layer_ids is {list(layer_ids)}; they must increase strictly and lie in -1..{num_layers - 1}."
        )
