"""How a new draft head begins: its shape for a target, and weights taken from the target.

Knows: which of the target's weights are a sensible start. Refuses to know: losses, optimisers, files.

Legend: V / V_d target / draft vocabulary, L feature layers, d hidden size, r Markov rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.autoregressive import KINDS as AUTOREGRESSIVE
from training.autoregressive import ArConfig, ArDraft
from training.data import Sequence, frequent_tokens
from training.decoder_config import DecoderConfig, flat_keys
from training.draft import DraftConfig, DraftModel
from training.formats.eagle3 import default_layers
from training.target import PackedBatch, TargetModel

KINDS = ("dspark", "dflash", *AUTOREGRESSIVE)


@dataclass(frozen=True)
class HeadShape:
    """The head to make. kind: one of KINDS (dflash: without Markov and confidence head; rank, head and mask_token_id
    are nothing to autoregressive ones); draft_vocab: most frequent answer tokens kept (0: all); layer_ids None: by
    kind. Raises ValueError for another kind."""

    depth: int = 2
    block_size: int = 6
    rank: int = 64
    head: str = "vanilla"
    mask_token_id: int = 16
    draft_vocab: int = 8192
    layer_ids: tuple[int, ...] | None = None
    kind: str = "dspark"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")

    @property
    def module(self) -> str:
        """The kind of module, as its config says it."""
        return self.kind if self.kind in AUTOREGRESSIVE else "parallel"

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """layer_ids, or what this kind reads of a target with so many layers: mtp its last one."""
        if self.layer_ids is not None:
            return self.layer_ids
        if self.kind == "mtp":
            return (num_layers - 1,)
        return default_layers(num_layers) if self.kind == "eagle3" else default_layer_ids(num_layers)


def default_layer_ids(num_layers: int, count: int = 5) -> tuple[int, ...]:
    """`count` layers spread from the second to the last but one; -1, the embedding output, below a lone layer."""
    low, high = min(1, num_layers - 2), num_layers - 2
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
        for layer, j in zip(draft.layers, last_like(target.config, draft.config.decoder, depth)):
            prefix, names = f"layers.{j}.", layer.state_dict()
            own = {k.removeprefix(prefix): v.float() for k, v in source.items() if k.startswith(prefix)}
            layer.load_state_dict({k: v for k, v in own.items() if k in names})
            attn = layer.self_attn
            for projection in filter(None, (attn.q_proj, attn.k_proj, attn.v_proj)):
                projection.weight.mul_(layer.input_layernorm.weight)
            layer.input_layernorm.weight.fill_(1.0)
        nn.init.normal_(draft.fc.weight, std=0.1 / math.sqrt(draft.fc.in_features), generator=generator)
        draft.fc.weight[:, -d:] += torch.eye(d)
        borrow_ends(draft, source, ids)
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


def last_like(target: DecoderConfig, draft: DecoderConfig, depth: int) -> list[int]:
    """The last `depth` target layers of the draft's kind, the first of them again where they are too few; [] where the
    two are of different families."""
    if (target.gemma4 is None) != (draft.gemma4 is None):
        return []
    like = [j for j, shape in enumerate(target.layers) if replace(shape, source=0) == draft.layer(0)]
    return [like[max(len(like) - depth + i, 0)] for i in range(depth)] if like else []


@torch.no_grad()
def stream_size(target: TargetModel, sequences: list[Sequence]) -> float:
    """The median root mean square of the last feature layer's output over a few sequences: how large the residual stream
    is there (a first token's may be six times that)."""
    some = sorted((np.asarray(s.tokens[:256], np.int32) for s in sequences), key=bytes)[:4]
    batch = PackedBatch.build([tokens.tolist() for tokens in some], [0] * len(some), max(len(tokens) for tokens in some))
    stream = target(batch, torch.zeros(1, dtype=torch.int64)).features[:, -target.config.hidden_size :]
    return float(stream.float().pow(2).mean(-1).sqrt().median())


def initialise_autoregressive(
    draft: ArDraft, target: TargetModel, ids: Tensor, seed: int, size: float = 1.0
) -> None:
    """A start in which the last true feature already goes through the target's last layers, and the next token's
    embedding comes in by noise (eagle3) or as it is (mtp).

    eagle3: fc = the deepest feature; the feature's half of q, k and v is the target's with its input norm folded in.
    mtp: eh_proj adds up both normed inputs, the feature at the target's `size` (stream_size): a layer adds to the stream
    as much as it did in the target, and would drown a smaller one. lm_head as of a parallel draft. Layers of another
    family than the draft's are no start: then they are PyTorch's own.
    """
    generator = torch.Generator().manual_seed(seed)
    source = target.state_dict()
    depth, d = len(draft.layers), draft.config.decoder.hidden_size
    with torch.no_grad():
        for i, layer in enumerate(draft.layers if target.config.gemma4 is None else ()):
            prefix = f"layers.{max(target.config.num_hidden_layers - depth + i, 0)}."
            own = {k.removeprefix(prefix): v.float() for k, v in source.items() if k.startswith(prefix)}
            if i == 0 and draft.config.kind == "eagle3":
                for name in ("q_proj", "k_proj", "v_proj"):
                    key = f"self_attn.{name}.weight"
                    wide = getattr(layer.self_attn, name).weight.new_empty(len(own[key]), 2 * d)
                    nn.init.normal_(wide[:, :d], std=0.1 / math.sqrt(d), generator=generator)
                    wide[:, d:] = own[key] * own["input_layernorm.weight"]
                    own[key] = wide
                own["hidden_norm.weight"] = own["input_layernorm.weight"] = torch.ones(d)
            layer.load_state_dict(own)
        if draft.config.kind == "eagle3":
            nn.init.normal_(draft.fc.weight, std=0.1 / math.sqrt(draft.fc.in_features), generator=generator)
            draft.fc.weight[:, -d:] += torch.eye(d)
        else:
            nn.init.normal_(draft.eh_proj.weight, std=0.1 / math.sqrt(2 * d), generator=generator)
            draft.eh_proj.weight += torch.cat([torch.eye(d), size * torch.eye(d)], dim=1)
        borrow_ends(draft, source, ids)


def borrow_ends(draft: DraftModel | ArDraft, source: dict[str, Tensor], ids: Tensor) -> None:
    """The final norm, the embedding, lm_head's rows without their mean, and the vocabulary map."""
    draft.norm.weight.copy_(source["norm.weight"])
    draft.embed_tokens.weight.copy_(source["embed_tokens.weight"])
    head = source["lm_head.weight"][ids].float()
    bent = draft.config.decoder.logit_softcap is not None  # then a mean is not nothing
    draft.lm_head.weight.copy_(head if bent else head - head.mean(0))
    if hasattr(draft, "d2t"):
        draft.d2t.copy_(ids - torch.arange(len(ids)))


def new_draft(
    target: TargetModel, sequences: list[Sequence], shape: HeadShape, seed: int, always: tuple[int, ...] = ()
) -> DraftModel | ArDraft:
    """A draft for this target (made with its layer_ids), initialised; its vocabulary is that of the sequences' answers.

    always: token ids kept in the draft vocabulary whatever their count (the end-of-sequence tokens)."""
    V = target.config.vocab_size
    ids = frequent_tokens(sequences, shape.draft_vocab or V, V, always)
    draft_vocab_size = len(ids) if len(ids) < V else None
    if shape.module != "parallel":
        decoder, layers = target.config.plain(shape.depth), target.config.num_hidden_layers
        draft = ArDraft(
            ArConfig(decoder, shape.kind, shape.block_size, target.layer_ids, layers, draft_vocab_size)
        )
        size = stream_size(target, sequences) if shape.kind == "mtp" else 1.0
        initialise_autoregressive(draft, target, ids, seed, size)
        return draft
    rank = 0 if shape.kind == "dflash" else shape.rank
    config = DraftConfig(
        decoder=target.config.for_draft(shape.depth), block_size=shape.block_size, mask_token_id=shape.mask_token_id,
        target_layer_ids=target.layer_ids, num_target_layers=target.config.num_hidden_layers,
        markov_rank=rank, markov_head_type=shape.head,
        enable_confidence_head=shape.kind != "dflash", confidence_head_with_markov=rank > 0,
        draft_vocab_size=draft_vocab_size,
    )  # fmt: skip
    draft = DraftModel(config)
    initialise(draft, target, ids, seed)
    return draft


def eos_ids(raw: dict) -> tuple[int, ...]:
    """The end-of-sequence ids of a Hugging Face config.json, as a tuple."""
    eos = flat_keys(raw).get("eos_token_id")
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)
