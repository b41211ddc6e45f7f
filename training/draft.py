"""The DSpark draft module: parallel backbone with KV injection, Markov head, confidence head (DFlash = markov_rank 0).

Knows: the drafter's mathematics (paper section 3) and the names its weights have in a DeepSpec checkpoint.
Refuses to know: how it is trained, stored, compiled or scheduled.

Legend: B sequences, S context positions, A anchors a sequence, G block size (gamma), d hidden size, V target
vocabulary, V_d draft vocabulary (V, or a trimmed subset), r Markov rank, L context feature layers, R requests.

Slot layout (the top bug of every peer): the block is [anchor, mask x (G-1)] at positions p .. p+G-1, p the anchor's
position; slot k (from 0) predicts the token at p+k+1; context features of positions < p are injected as keys and
values. With sample_from_anchor false (DFlash's first checkpoints) the block is [anchor, mask x G] at p .. p+G, each
mask predicts the token at its own position, and what comes out of the anchor's slot is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block_attention import block_attention
from .decoder_config import DecoderConfig
from .families import decoder_layer
from .layers import RMSNorm, rotate, scaled, softcapped
from .target import check_layer_ids

MARKOV_HEADS = ("vanilla", "gated", "rnn")


@dataclass(frozen=True)
class DraftConfig:
    """A draft module for one target. `decoder.num_hidden_layers` is the drafter's depth; block_size is G, the tokens
    drafted at once, whether or not the anchor's slot drafts one of them."""

    decoder: DecoderConfig
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False
    draft_vocab_size: int | None = None
    num_anchors: int = 512
    sample_from_anchor: bool = True

    def __post_init__(self) -> None:
        check_layer_ids(self.target_layer_ids, self.num_target_layers)
        if not self.target_layer_ids:
            raise ValueError("target_layer_ids is empty; name at least one target layer (or -1, the embedding output).")
        if self.target_layer_ids[-1] == self.num_target_layers - 1:
            raise ValueError(
                f"target_layer_ids is {list(self.target_layer_ids)}; {self.target_layer_ids[-1]} is the target's last "
                "layer, whose output trainers store before or after the final norm and which this draft may not read; "
                f"they must lie in -1..{self.num_target_layers - 2}."
            )
        if not 1 <= self.block_size <= 64:
            raise ValueError(f"block_size is {self.block_size}; it must lie in 1..64.")
        if self.markov_rank < 0:
            raise ValueError(f"markov_rank is {self.markov_rank}; it must be 0 (DFlash) or more.")
        if self.markov_rank and self.markov_head_type not in MARKOV_HEADS:
            raise ValueError(
                f"markov_head_type is {self.markov_head_type!r}; it must be one of {', '.join(MARKOV_HEADS)}."
            )
        if not 0 <= self.mask_token_id < self.decoder.vocab_size:
            raise ValueError(f"mask_token_id is {self.mask_token_id}; it must lie in 0..{self.decoder.vocab_size - 1}.")
        if self.confidence_head_with_markov and self.enable_confidence_head and not self.markov_rank:
            raise ValueError("confidence_head_with_markov is true but markov_rank is 0; there is no Markov embedding.")
        if self.markov_rank and self.markov_head_type == "rnn" and not self.sample_from_anchor:
            raise ValueError(
                "markov_head_type is 'rnn' and sample_from_anchor is false; such a head must draft from its anchor."
            )
        if not 1 <= self.vocab_out <= self.decoder.vocab_size:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size}; it must lie in 1..{self.decoder.vocab_size}."
            )

    kind = "parallel"  # the others: autoregressive.py

    @property
    def vocab_out(self) -> int:
        """V_d."""
        return self.draft_vocab_size or self.decoder.vocab_size

    @property
    def block_slots(self) -> int:
        """Slots of the block: G, and one more where the anchor's own slot drafts nothing."""
        return self.block_size + (0 if self.sample_from_anchor else 1)


class MarkovHead(nn.Module):
    """Sequential head: a rank-r bias on slot k's logits from the token before it (paper section 3.1).

    vanilla: W2 W1[x]; gated: W2 (sigmoid(Wg [h; W1[x]]) * W1[x]); rnn: a GRU-like state over the block's prefix.
    W1 has a row for every target token (the anchor can be any), W2 one for every draft token.
    """

    def __init__(self, c: DraftConfig):
        super().__init__()
        self.kind, self.rank = c.markov_head_type, c.markov_rank
        d = c.decoder.hidden_size
        self.markov_w1 = nn.Embedding(c.decoder.vocab_size, self.rank)
        self.markov_w2 = nn.Linear(self.rank, c.vocab_out, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(d + self.rank, self.rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * self.rank + d, 3 * self.rank)

    def embed(self, previous: Tensor) -> Tensor:
        """previous [...] target ids -> [..., r]."""
        return self.markov_w1(previous)

    def step(self, state: Tensor, embedding: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One slot: state [..., r], embedding [..., r], hidden [..., d] -> (new state [..., r], latent [..., r]).

        The slot's logit bias is markov_w2(latent); only the rnn head uses the state.
        """
        if self.kind == "vanilla":
            return state, embedding
        if self.kind == "gated":
            return state, torch.sigmoid(self.gate_proj(torch.cat([hidden, embedding], dim=-1))) * embedding
        gate, candidate, out = self.joint_proj(torch.cat([state, embedding, hidden], dim=-1)).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return gate * state + (1 - gate) * torch.tanh(candidate), torch.tanh(out)

    def block_latents(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Teacher-forced block: embeddings [..., G, r], hidden [..., G, d] -> latents [..., G, r]."""
        if self.kind != "rnn":
            return self.step(embeddings, embeddings, hidden)[1]
        state, latents = torch.zeros_like(embeddings[..., 0, :]), []
        for k in range(embeddings.shape[-2]):
            state, latent = self.step(state, embeddings[..., k, :], hidden[..., k, :])
            latents.append(latent)
        return torch.stack(latents, dim=-2)


class ConfidenceHead(nn.Module):
    """c_k = w [h_k; W1[x_{k-1}]] + b, a logit: chance that slot k is accepted given that all before it were."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features).squeeze(-1)


@dataclass(frozen=True)
class DraftBlock:
    """One sampled block: tokens [R, G] (target ids), logits [R, G, V_d] (corrected), confidence logits [R, G] or
    None."""

    tokens: Tensor
    logits: Tensor
    confidence: Tensor | None


class DraftModel(nn.Module):
    """The draft module. Weight names are those of a DeepSpec checkpoint, plus `d2t` [V_d] int64 when the draft
    vocabulary is trimmed (EAGLE-3's convention: target id of draft token i = i + d2t[i])."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        c, dec = config, config.decoder
        self.config = config
        self.embed_tokens = nn.Embedding(dec.vocab_size, dec.hidden_size)
        self.layers = nn.ModuleList(decoder_layer(dec, i) for i in range(dec.num_hidden_layers))
        self.norm = RMSNorm(dec.hidden_size, dec.rms_norm_eps)
        self.fc = nn.Linear(len(c.target_layer_ids) * dec.hidden_size, dec.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(dec.hidden_size, dec.rms_norm_eps)
        self.lm_head = nn.Linear(dec.hidden_size, c.vocab_out, bias=False)
        self.markov_head = MarkovHead(c) if c.markov_rank else None
        self.confidence_head = None
        if c.enable_confidence_head:
            width = dec.hidden_size + (c.markov_rank if c.confidence_head_with_markov else 0)
            self.confidence_head = ConfidenceHead(width)
        if c.vocab_out < dec.vocab_size:
            self.register_buffer("d2t", torch.zeros(c.vocab_out, dtype=torch.int64))
        self._rope: tuple[Tensor, Tensor] | None = None

    def draft_to_target(self) -> Tensor:
        """[V_d] int64: the target id of each draft token."""
        ids = torch.arange(self.config.vocab_out)
        return ids + self.d2t if hasattr(self, "d2t") else ids

    def rope_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos, sin [>= positions, D/2] float32."""
        if self._rope is None or self._rope[0].shape[0] < positions:
            shape = self.config.decoder.layer(0)  # all are alike
            self._rope = shape.rope.tables(shape.head_dim, max(positions, 512))
        return self._rope

    def block_ids(self, anchors: Tensor) -> Tensor:
        """anchors [...] -> [..., block_slots]: the anchor, then mask tokens."""
        ids = anchors.new_full((*anchors.shape, self.config.block_slots), self.config.mask_token_id)
        ids[..., 0] = anchors
        return ids

    def backbone(
        self, features: Tensor, anchors: Tensor, anchor_positions: Tensor, keep: Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """All blocks of a batch in one pass (paper section 3.1; training, and the reference for the engine).

        features [B, S, L*d] of positions 0..S-1 (a block sees those before its anchor), anchors [B, A] ids,
        anchor_positions [B, A] (<= S), keep [B, A] bool or None. offset: how far the block lies from where it belongs
        (not 0 only in repairs.py's trials). Returns the normed hidden states [B, A, G, d].
        """
        B, S, _ = features.shape
        A, slots = anchors.shape[1], self.config.block_slots
        context = self.hidden_norm(self.fc(features))
        positions = (anchor_positions[..., None] + torch.arange(slots) + offset).clamp_min(0)
        cos, sin = self.rope_tables(max(S, int(positions.max()) + 1))
        cos_c, sin_c = cos[:S, None], sin[:S, None]
        cos_b, sin_b = cos[positions].flatten(1, 2)[:, :, None], sin[positions].flatten(1, 2)[:, :, None]
        sees = torch.arange(S) < anchor_positions[..., None]
        if keep is not None:
            sees = sees & keep[..., None]
        bias = torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))  # [B, A, S]
        dec = self.config.decoder
        x = scaled(self.embed_tokens(self.block_ids(anchors)), dec.embed_scale).flatten(1, 2)  # [B, A*slots, d]
        for layer in self.layers:
            h, attn = layer.input_layernorm(x), layer.self_attn
            q = rotate(attn.queries(h), cos_b, sin_b)
            k_block, v_block = rotate(attn.keys(h), cos_b, sin_b), attn.values(h)
            k_context, v_context = rotate(attn.keys(context), cos_c, sin_c), attn.values(context)
            o = block_attention(q, k_context, v_context, k_block, v_block, bias, slots, dec.attention_scale)
            x = layer.finish(x, o)
        return self.norm(x).unflatten(1, (A, slots))[:, :, slots - self.config.block_size :]

    def base_logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> [..., V_d], before the Markov head."""
        return softcapped(self.lm_head(hidden), self.config.decoder.logit_softcap)

    def corrected_logits(self, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor | None]:
        """Teacher-forced: hidden [..., G, d], previous [..., G] (token before each slot) ->
        (logits [..., G, V_d], confidence logits [..., G] or None)."""
        logits, embeddings = self.base_logits(hidden), None
        if self.markov_head is not None:
            embeddings = self.markov_head.embed(previous)
            logits = logits + self.markov_head.markov_w2(self.markov_head.block_latents(embeddings, hidden))
        return logits, self.confidence(hidden, embeddings)

    def confidence(self, hidden: Tensor, embeddings: Tensor | None) -> Tensor | None:
        """hidden [..., G, d], Markov embeddings [..., G, r] of the token before each slot -> logits [..., G]."""
        if self.confidence_head is None:
            return None
        if self.config.confidence_head_with_markov:
            hidden = torch.cat([hidden, embeddings.to(hidden.dtype)], dim=-1)
        return self.confidence_head(hidden).float()

    def sample_block(self, hidden: Tensor, anchors: Tensor, temperature: Tensor, uniforms: Tensor) -> DraftBlock:
        """The sequential head: hidden [R, G, d], anchors [R], temperature [R] (0 = greedy), uniforms [R, G] in [0, 1).

        Inverse-CDF sampling, one uniform a slot: the same rule as the markov engine.
        """
        base, to_target = self.base_logits(hidden), self.draft_to_target()
        previous, tokens, rows, embeddings = anchors, [], [], []
        state = base.new_zeros(anchors.shape[0], max(self.config.markov_rank, 1))
        for k in range(self.config.block_size):
            logits = base[:, k]
            if self.markov_head is not None:
                embedding = self.markov_head.embed(previous)
                state, latent = self.markov_head.step(state, embedding, hidden[:, k])
                logits = logits + self.markov_head.markov_w2(latent)
                embeddings.append(embedding)
            previous = to_target[sample_inverse_cdf(logits, temperature, uniforms[:, k])]
            tokens.append(previous)
            rows.append(logits)
        stacked = torch.stack(embeddings, dim=1) if embeddings else None
        return DraftBlock(torch.stack(tokens, 1), torch.stack(rows, 1), self.confidence(hidden, stacked))


def sample_inverse_cdf(logits: Tensor, temperature: Tensor, uniforms: Tensor) -> Tensor:
    """logits [R, V], temperature [R], uniforms [R] -> [R] ids; temperature 0 takes the argmax."""
    greedy = temperature <= 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    cdf = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
    drawn = (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    return torch.where(greedy, logits.argmax(dim=-1), drawn)
