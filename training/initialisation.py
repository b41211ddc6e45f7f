"""How a new draft head begins: its shape for a target, and weights taken from the target.

Knows: which of the target's weights are a sensible start. Refuses to know: losses, optimisers, files.

Legend: V / V_d target / draft vocabulary, L feature layers, d hidden size, r Markov rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import Sequence, frequent_tokens
from training.draft import DraftConfig, DraftModel
from training.target import TargetModel


@dataclass(frozen=True)
class HeadShape:
    """The head to make. draft_vocab: most frequent answer tokens kept (0: all); layer_ids None: default_layer_ids."""

    depth: int = 2
    block_size: int = 6
    rank: int = 64
    head: str = "vanilla"
    mask_token_id: int = 16
    draft_vocab: int = 8192
    layer_ids: tuple[int, ...] | None = None


def default_layer_ids(num_layers: int, count: int = 5) -> tuple[int, ...]:
    """`count` layers spread from the second to the last but one."""
    low, high = min(1, num_layers - 1), max(num_layers - 2, 0)
    return tuple(sorted({round(low + i * (high - low) / (count - 1)) for i in range(count)}))


def initialise(draft: DraftModel, target: TargetModel, ids: Tensor, seed: int) -> None:
    """A start that already reads the target's features: layers = the target's last ones, fc = the deepest feature.

    The layers' input norms are folded into q, k and v, so that context features, which pass through hidden_norm only,
    are scaled as the projections expect. lm_head rows are the target's, their mean taken out (softmax does not see it,
    and smaller logits round better in bf16). Markov embeddings are principal components of the target's, markov_w2 is
    0.
    """
    generator = torch.Generator().manual_seed(seed)
    source = target.state_dict()
    depth, d = len(draft.layers), draft.config.decoder.hidden_size
    with torch.no_grad():
        for i, layer in enumerate(draft.layers):
            prefix = f"layers.{max(target.config.num_hidden_layers - depth + i, 0)}."
            own = {k.removeprefix(prefix): v.float() for k, v in source.items() if k.startswith(prefix)}
            layer.load_state_dict(own)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.mul_(layer.input_layernorm.weight)
            layer.input_layernorm.weight.fill_(1.0)
        draft.norm.weight.copy_(source["norm.weight"])
        nn.init.normal_(draft.fc.weight, std=0.1 / math.sqrt(draft.fc.in_features), generator=generator)
        draft.fc.weight[:, -d:] += torch.eye(d)
        draft.embed_tokens.weight.copy_(source["embed_tokens.weight"])
        head = source["lm_head.weight"][ids].float()
        draft.lm_head.weight.copy_(head - head.mean(0))
        if hasattr(draft, "d2t"):
            draft.d2t.copy_(ids - torch.arange(len(ids)))
        if draft.markov_head is not None:
            embedding = source["embed_tokens.weight"].float()
            centred = embedding - embedding.mean(0)
            _, vectors = torch.linalg.eigh(centred.t() @ centred)
            r = min(draft.config.markov_rank, d)
            reduced = F.pad(centred @ vectors[:, -r:], (0, draft.config.markov_rank - r))
            draft.markov_head.markov_w1.weight.copy_(0.5 * reduced / reduced.std())
            nn.init.zeros_(draft.markov_head.markov_w2.weight)
        if draft.confidence_head is not None:
            nn.init.zeros_(draft.confidence_head.proj.weight)
            nn.init.zeros_(draft.confidence_head.proj.bias)


def new_draft(
    target: TargetModel, sequences: list[Sequence], shape: HeadShape, seed: int, always: tuple[int, ...] = ()
) -> DraftModel:
    """A draft for this target (made with its layer_ids), initialised; its vocabulary is that of the sequences' answers.

    always: token ids kept in the draft vocabulary whatever their count (the end-of-sequence tokens)."""
    V = target.config.vocab_size
    ids = frequent_tokens(sequences, shape.draft_vocab or V, V, always)
    config = DraftConfig(
        decoder=replace(target.config, num_hidden_layers=shape.depth, tie_word_embeddings=False),
        block_size=shape.block_size, mask_token_id=shape.mask_token_id, target_layer_ids=target.layer_ids,
        num_target_layers=target.config.num_hidden_layers, markov_rank=shape.rank, markov_head_type=shape.head,
        enable_confidence_head=True, confidence_head_with_markov=shape.rank > 0,
        draft_vocab_size=len(ids) if len(ids) < V else None,
    )  # fmt: skip
    draft = DraftModel(config)
    initialise(draft, target, ids, seed)
    return draft


def eos_ids(raw: dict) -> tuple[int, ...]:
    """The end-of-sequence ids of a Hugging Face config.json, as a tuple."""
    eos = raw.get("eos_token_id")
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)
