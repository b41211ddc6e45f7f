"""Autoregressive draft modules: EAGLE-3 (arXiv:2503.01840) and the MTP module of DeepSeek-V3 (arXiv:2412.19437, 2.2).

Knows: how a row (target feature, next token's embedding) becomes a prediction, and the names of its weights here.
Refuses to know: losses, files, ONNX, scheduling.

A row at position i pairs the target's feature of position i with the embedding of the token at i+1; its output predicts
the token at i+2. The anchor (newest committed token, unseen by the target) stands at p. Slot 0 (the token at p+1) comes
from row p-1, the last with a true feature; slot k >= 1 from a step that takes the draft's own hidden state of the row
before and the embedding of the token at p+k, at rotary position p-1+k. A step attends the rows 0..p-1 and the steps of
its own block; keys and values of steps are never kept.

Legend: B sequences, S rows (positions 0..S-1), A anchors a sequence, R requests, C cached rows, G block size, T steps
so far, d hidden size, V / V_d target / draft vocabulary, L feature layers, H / H_kv heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.decoder_config import DecoderConfig
from training.draft import DraftBlock, sample_inverse_cdf
from training.layers import DecoderLayer, RMSNorm, rotate
from training.target import check_layer_ids, scaled

KINDS = ("eagle3", "mtp")
Cache = tuple[Tensor, Tensor]  # keys (rotated) and values of one layer


@dataclass(frozen=True)
class ArConfig:
    """One module for one target. kind: "eagle3" or "mtp"; decoder.num_hidden_layers is the depth; block_size is G, the
    tokens drafted in a round. Raises ValueError, one sentence, for what cannot be."""

    decoder: DecoderConfig
    kind: str
    block_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    draft_vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")
        if self.decoder.gemma4 is not None:
            raise ValueError("an autoregressive draft has Llama-style layers, and its decoder is Gemma4's.")
        check_layer_ids(self.target_layer_ids, self.num_target_layers)
        if not self.target_layer_ids:
            raise ValueError("target_layer_ids is empty; name at least one target layer (or -1, the embedding output).")
        last = self.num_target_layers - 1
        if self.kind == "eagle3" and self.target_layer_ids[-1] == last:
            raise ValueError(
                f"target_layer_ids is {list(self.target_layer_ids)}; an eagle3 draft may not read {last}, the target's "
                f"last layer; they must lie in -1..{last - 1}."
            )
        if self.kind == "mtp" and len(self.target_layer_ids) != 1:
            raise ValueError(
                f"target_layer_ids is {list(self.target_layer_ids)}; an mtp module reads exactly one layer."
            )
        if not 1 <= self.block_size <= 64:
            raise ValueError(f"block_size is {self.block_size}; it must lie in 1..64.")
        if self.decoder.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers is {self.decoder.num_hidden_layers}; it must be 1 or more.")
        if not 1 <= self.vocab_out <= self.decoder.vocab_size:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size}; it must lie in 1..{self.decoder.vocab_size}."
            )

    @property
    def vocab_out(self) -> int:
        """V_d."""
        return self.draft_vocab_size or self.decoder.vocab_size

    @property
    def block_slots(self) -> int:
        return self.block_size

    # What a parallel draft has and these have not, for those who read any draft's config.
    markov_rank = 0
    markov_head_type = "vanilla"
    enable_confidence_head = False
    confidence_head_with_markov = False
    sample_from_anchor = True
    mask_token_id = 0  # no slot holds it


class EagleLayer(DecoderLayer):
    """EAGLE-3's first layer: its attention reads [input_layernorm(embedding), hidden_norm(feature)], 2d wide."""

    def __init__(self, c: DecoderConfig):
        super().__init__(c)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        for name in ("q_proj", "k_proj", "v_proj"):
            width = getattr(self.self_attn, name).out_features
            setattr(self.self_attn, name, nn.Linear(2 * c.hidden_size, width, bias=c.attention_bias))


@dataclass(frozen=True)
class Rows:
    """Rows of true features: hidden [B, S or A, d] before the final norm, caches of each layer [B, S, H_kv, D]."""

    hidden: Tensor
    caches: list[Cache]


class ArDraft(nn.Module):
    """embed_tokens, layers.{i}, norm, lm_head (V_d rows), d2t [V_d] int64 offsets where the vocabulary is trimmed.

    eagle3: fc [d, L*d], layers.0.hidden_norm. mtp: enorm, hnorm, eh_proj [d, 2d] (embedding first, as public ones are).
    """

    def __init__(self, config: ArConfig):
        super().__init__()
        c, dec, d = config, config.decoder, config.decoder.hidden_size
        self.config = config
        self.embed_tokens = nn.Embedding(dec.vocab_size, d)
        if c.kind == "eagle3":
            self.fc = nn.Linear(len(c.target_layer_ids) * d, d, bias=False)
            first: DecoderLayer = EagleLayer(dec)
        else:
            self.enorm, self.hnorm = RMSNorm(d, dec.rms_norm_eps), RMSNorm(d, dec.rms_norm_eps)
            self.eh_proj = nn.Linear(2 * d, d, bias=False)
            first = DecoderLayer(dec)
        self.layers = nn.ModuleList([first, *(DecoderLayer(dec) for _ in range(dec.num_hidden_layers - 1))])
        self.norm = RMSNorm(d, dec.rms_norm_eps)
        self.lm_head = nn.Linear(d, c.vocab_out, bias=False)
        if c.vocab_out < dec.vocab_size:
            self.register_buffer("d2t", torch.zeros(c.vocab_out, dtype=torch.int64))
        self._rope: tuple[Tensor, Tensor] | None = None

    markov_head = confidence_head = None  # which parallel drafts may have

    def confidence(self, hidden: Tensor, embeddings: Tensor | None) -> None:
        """Nothing says how sure it is."""

    def draft_to_target(self) -> Tensor:
        """[V_d] int64: the target id of each draft token."""
        ids = torch.arange(self.config.vocab_out, device=self.lm_head.weight.device)
        return ids + self.d2t if hasattr(self, "d2t") else ids

    def rope_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos, sin [>= positions, D/2] float32, where the weights are."""
        device = self.lm_head.weight.device
        if self._rope is None or self._rope[0].shape[0] < positions or self._rope[0].device != device:
            tables = self.config.decoder.rope.tables(self.config.decoder.head_dim, max(positions, 512))
            self._rope = tuple(table.to(device) for table in tables)
        return self._rope

    def fuse(self, features: Tensor) -> Tensor:
        """[..., L*d] -> a row's feature [..., d]. A step's feature is the hidden state before it and is not fused."""
        return self.fc(features) if self.config.kind == "eagle3" else features

    def enter(self, feature: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """feature [..., d], ids [...] of the next tokens -> residual stream [..., d] float32 and the first attention's
        input [..., d] (eagle3: [..., 2d])."""
        embedding, first = scaled(self.embed_tokens(ids), self.config.decoder.embed_scale), self.layers[0]
        if self.config.kind == "eagle3":
            wide = torch.cat([first.input_layernorm(embedding), first.hidden_norm(feature).to(embedding.dtype)], dim=-1)
            return feature.float(), wide
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(feature).to(embedding.dtype)], dim=-1)).float()
        return x, first.input_layernorm(x)

    def leave(self, i: int, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rest of layer i: residual stream x [..., d], attended [..., H*D] -> the stream behind it and the next
        layer's input (None behind the last)."""
        x = self.layers[i].finish(x, attended)
        return x, self.layers[i + 1].input_layernorm(x) if i + 1 < len(self.layers) else None

    def rows(self, features: Tensor, next_ids: Tensor, at: Tensor | None = None) -> Rows:
        """Rows at positions 0..S-1, each attending those up to itself: features [B, S, L*d], next_ids [B, S] (the token
        behind each row). at [B, A]: the rows whose hidden state is wanted (None: all); the caches hold all S."""
        S = features.shape[1]
        cos, sin = (table[:S, None] for table in self.rope_tables(S))
        x, h = self.enter(self.fuse(features), next_ids)
        caches, asking = [], torch.arange(S, device=x.device).expand(len(x), S)
        for i, layer in enumerate(self.layers):
            attn = layer.self_attn
            caches.append((rotate(attn.keys(h), cos, sin), attn.values(h)))
            if at is not None and i == len(self.layers) - 1:  # the other rows' queries would serve nobody
                x, h, asking = take(x, at), take(h, at), at
            q = rotate(attn.queries(h), cos[asking], sin[asking])
            x, h = self.leave(i, x, attend(q, caches[-1], sees(S, asking + 1)))
        return Rows(x, caches)

    def step(
        self, hidden: Tensor, ids: Tensor, position: Tensor, caches: list[Cache], bias: Tensor, past: list[Cache]
    ) -> tuple[Tensor, list[Cache]]:
        """One step of each block: hidden [B, A, d] of the row before, ids [B, A] of the token behind it, position
        [B, A] of this step (p-1+k), caches of the true rows, bias [B, A, S] (0 = attend, -inf = not), past: this
        block's steps so far, [B, A, T, H_kv, D] a layer ([]: none). Returns hidden [B, A, d] before the final norm, and past
        with this one."""
        cos, sin = (table[position][:, :, None] for table in self.rope_tables(int(position.max()) + 1))
        x, h = self.enter(hidden, ids)
        now: list[Cache] = []
        for i, layer in enumerate(self.layers):
            attn = layer.self_attn
            own = rotate(attn.keys(h), cos, sin)[:, :, None], attn.values(h)[:, :, None]
            now.append(tuple(torch.cat(pair, dim=2) for pair in zip(past[i], own)) if past else own)
            x, h = self.leave(i, x, attend(rotate(attn.queries(h), cos, sin), caches[i], bias, now[i]))
        return x, now

    def unroll(self, features: Tensor, tokens: Tensor, anchors: Tensor, steps: int) -> Tensor:
        """Teacher-forced blocks of all anchors at once (EAGLE-3's training-time test): features [B, S, L*d], tokens
        [B, S], anchors [B, A] positions -> normed hidden states [B, A, steps, d] of slots 0..steps-1. An anchor at
        position 0 has no row before it: what it gets means nothing."""
        S = tokens.shape[1]
        rows = self.rows(features, tokens.roll(-1, dims=1), (anchors - 1).clamp_min(0))
        hidden, past, out = rows.hidden, [], [self.norm(rows.hidden)]
        bias = sees(S, anchors)
        for k in range(1, steps):
            ids = tokens.gather(1, (anchors + k).clamp_max(S - 1))
            hidden, past = self.step(hidden, ids, (anchors - 1 + k).clamp_min(0), rows.caches, bias, past)
            out.append(self.norm(hidden))
        return torch.stack(out, dim=2)

    def sample_block(
        self, hidden: Tensor, position: Tensor, caches: list[Cache], bias: Tensor, temperature: Tensor, uniforms: Tensor
    ) -> DraftBlock:
        """The steps, drawing: hidden [R, d] of rows p-1 (before the final norm), position [R] (p: the anchor's, and the
        first step's), caches [R, C, H_kv, D] a layer, bias [R, C] (0: one of the cached rows 0..p-1, else -inf),
        temperature [R] (0 = greedy), uniforms [R, G] in [0, 1). The same rule as the markov engine's."""
        to_target, tokens, logits = self.draft_to_target(), [], []
        hidden, past = hidden[:, None], []
        for k in range(self.config.block_size):
            if k:
                step_position = position[:, None] - 1 + k
                hidden, past = self.step(hidden, tokens[-1][:, None], step_position, caches, bias[:, None], past)
            logits.append(self.lm_head(self.norm(hidden[:, 0])))
            tokens.append(to_target[sample_inverse_cdf(logits[-1], temperature, uniforms[:, k])])
        return DraftBlock(torch.stack(tokens, 1), torch.stack(logits, 1), None)


def take(x: Tensor, at: Tensor) -> Tensor:
    """x [B, S, w], at [B, A] -> [B, A, w]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def sees(S: int, rows: Tensor) -> Tensor:
    """rows [B, A]: how many from the first on may be attended -> [B, A, S] float32: 0 or -inf."""
    unseen = torch.arange(S, device=rows.device) >= rows[..., None]
    return torch.zeros(unseen.shape, device=rows.device).masked_fill(unseen, float("-inf"))


def attend(q: Tensor, cache: Cache, bias: Tensor, own: Cache | None = None) -> Tensor:
    """q [B, A, H, D], cache [B, S, H_kv, D], bias [B, A, S], own [B, A, T, H_kv, D] (of the asking block, all seen) ->
    [B, A, H*D]. One softmax (float32) over two products: the cache is copied for no block."""
    S = cache[0].shape[1]
    q = q.unflatten(2, (cache[0].shape[2], -1)) * q.shape[-1] ** -0.5
    scores = torch.einsum("bahgd,bshd->bahgs", q, cache[0]) + bias[:, :, None, None].to(q.dtype)
    if own is not None:
        scores = torch.cat([scores, torch.einsum("bahgd,bathd->bahgt", q, own[0])], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
    o = torch.einsum("bahgs,bshd->bahgd", weights[..., :S], cache[1])
    if own is not None:
        o = o + torch.einsum("bahgt,bathd->bahgd", weights[..., S:], own[1])
    return o.flatten(2)
