"""What would a draft accept if it were read in another way? Single changes of how a checkpoint is understood, tried
out.

Knows: the mistakes that load without an error (layer ids off by one, the slot layout, the mask token, the vocabulary
map, the Markov head, the order of an autoregressive draft's two inputs), and greedy acceptance on a text of the
target's own. Refuses to know: files, prompts, what is printed.

The text is the target's greedy one, so a draft token is accepted exactly where it equals the text. Every position of
the answer is an anchor; all trials see the same anchors and the same features.

Legend: T tokens of a text, A anchors, G block size, L feature layers, d hidden size, V / V_d target / draft vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from training.autoregressive import ArConfig, ArDraft, sees
from training.draft import DraftConfig, DraftModel, MarkovHead
from training.target import PackedBatch, TargetModel

CLEARLY = 3.0  # standard errors by which a repair must win
GAIN = 1.15  # and the factor
MASK_IDS = (151669, 248070, 248077)  # what public drafts for Qwen targets use


@dataclass(frozen=True)
class Text:
    """tokens [T] (prompt, then the target's greedy answer); features: layer id -> [T, d]."""

    tokens: Tensor
    prompt_length: int
    features: dict[int, Tensor]


@dataclass(frozen=True)
class Reading:
    """One way to understand a draft. name: what is changed, in words and as the config says it."""

    name: str
    config: DraftConfig | ArConfig
    offset: int = 0
    d2t: Tensor | None = None  # instead of the draft's own
    delayed: bool = False  # the Markov head sees the token one earlier
    swapped: bool = False  # an autoregressive draft's first weights take the feature before the embedding
    shuffled: bool = False  # the features (and an autoregressive draft's tokens) are of other positions: what is
    # accepted without reading the target


@dataclass(frozen=True)
class Trial:
    """accepted [anchors] of one reading; mean is per block, without the bonus token."""

    reading: Reading
    accepted: Tensor

    @property
    def mean(self) -> float:
        return float(self.accepted.float().mean()) if len(self.accepted) else 0.0

    def beats(self, other: "Trial") -> bool:
        """By the factor GAIN and, over the same anchors, by CLEARLY standard errors."""
        gain = (self.accepted - other.accepted).float()
        if len(gain) < 2 or self.mean < GAIN * other.mean:
            return False
        return float(gain.mean()) > CLEARLY * max(float(gain.std()), 0.1) / math.sqrt(len(gain))


@torch.inference_mode()
def read_text(target: TargetModel, tokens: list[int], prompt_length: int) -> Text:
    """One pass of the target, which must have been made with every layer id that a reading may name."""
    out = target(PackedBatch.build([tokens], [0], len(tokens)), torch.zeros(0, dtype=torch.int64))
    parts = out.features.split(target.config.hidden_size, dim=-1)
    return Text(torch.tensor(tokens), prompt_length, dict(zip(target.layer_ids, parts)))


def layers_wanted(config: DraftConfig | ArConfig) -> tuple[int, ...]:
    """The draft's layer ids and their neighbours, as far as the target has them."""
    near = {i + step for i in config.target_layer_ids for step in (-1, 0, 1)}
    return tuple(sorted(i for i in near if -1 <= i < config.num_target_layers))


@torch.inference_mode()
def accepted(draft: DraftModel | ArDraft, reading: Reading, texts: list[Text], most: int | None = None) -> Trial:
    """Greedy acceptance of the draft under a reading. most: anchors of a text at most (evenly spread), None = all."""
    longest = draft.config.block_size + 1
    counts = [_accepted(_view(draft, reading), reading, text, longest, most) for text in texts]
    return Trial(reading, torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64))


def _accepted(
    view: DraftModel | ArDraft, reading: Reading, text: Text, longest: int, most: int | None
) -> Tensor:
    """[A] int64. Anchors are those that every reading can judge: `longest` tokens of the answer follow them."""
    at = torch.arange(max(text.prompt_length, 1), len(text.tokens) - longest)
    if most is not None and len(at) > most:
        at = at[torch.linspace(0, len(at) - 1, most).long()]
    if not len(at):
        return at
    features = torch.cat([text.features[i] for i in reading.config.target_layer_ids], dim=-1).float()
    if reading.shuffled:
        features = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]
    anchors, G = text.tokens[at], view.config.block_size
    if isinstance(view, ArDraft):
        following = text.tokens.roll(-1)
        if reading.shuffled:  # the tokens too: it is shown every one, and knows much by them alone
            following = following[torch.randperm(len(following), generator=torch.Generator().manual_seed(1))]
        rows = view.rows(features[None], following[None], at[None] - 1)
        caches = [tuple(part.expand(len(at), -1, -1, -1) for part in cache) for cache in rows.caches]
        nothing = torch.zeros(len(at)), torch.zeros(len(at), G)
        drafted = view.sample_block(rows.hidden[0], at, caches, sees(len(text.tokens), at), *nothing).tokens
        return hits(drafted, text, at)
    if reading.delayed:
        view._modules["markov_head"] = Delayed(view.markov_head, text.tokens[at - 1])
    hidden = view.backbone(features[None], anchors[None], at[None], offset=reading.offset)[0]
    drafted = view.sample_block(hidden, anchors, torch.zeros(len(at)), torch.zeros(len(at), G)).tokens
    return hits(drafted, text, at)


def hits(drafted: Tensor, text: Text, at: Tensor) -> Tensor:
    """drafted [A, G] behind the anchors at positions [A] -> [A]: how many from the first on are the text's."""
    truth = text.tokens[at[:, None] + 1 + torch.arange(drafted.shape[1])]
    return (drafted == truth).long().cumprod(dim=1).sum(dim=1)


def _view(draft: DraftModel | ArDraft, reading: Reading) -> DraftModel | ArDraft:
    """The same weights under the reading's config; the draft itself stays as it is."""
    if isinstance(draft, ArDraft):
        view = swapped(draft) if reading.swapped else copy.copy(draft)
        view.config = reading.config
        if reading.d2t is not None:
            view._buffers = {**draft._buffers, "d2t": reading.d2t}
        return view
    view = copy.copy(draft)
    view.config = replace(reading.config, enable_confidence_head=False)
    view._modules = {**draft._modules, "confidence_head": None}
    if not reading.config.markov_rank:
        view._modules["markov_head"] = None
    if reading.d2t is not None:
        view._buffers = {**draft._buffers, "d2t": reading.d2t}
    return view


def swapped(draft: ArDraft) -> ArDraft:
    """The draft whose first weights have the halves for embedding and feature the other way round."""

    def turned(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
        other = copy.copy(module)
        other._modules = dict(module._modules)
        for name in names:
            linear = other._modules[name] = copy.copy(module._modules[name])
            weight = linear.weight.roll(linear.in_features // 2, dims=1)
            linear._parameters = {**linear._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
        return other

    if draft.config.kind == "mtp":
        return turned(draft, ("eh_proj",))
    view, first = turned(draft, ()), turned(draft.layers[0], ())
    first._modules["self_attn"] = turned(first.self_attn, ("q_proj", "k_proj", "v_proj"))
    view._modules["layers"] = nn.ModuleList([first, *draft.layers[1:]])
    return view


class Delayed:
    """A Markov head that is shown, at each slot, the token before the one it should see."""

    def __init__(self, head: MarkovHead | Delayed, before: Tensor):
        self.head, self.before = getattr(head, "head", head), before
        self.step, self.markov_w2 = self.head.step, self.head.markov_w2

    def embed(self, previous: Tensor) -> Tensor:
        shown, self.before = self.before, previous
        return self.head.embed(shown)


def readings(config: DraftConfig | ArConfig, maps: dict[str, Tensor]) -> Iterator[Reading]:
    """Every single change but the mask token's. maps: other vocabulary maps (offsets [V_d]) by where they come from."""
    ids, G = config.target_layer_ids, config.block_size
    last = config.num_target_layers - (1 if config.kind == "mtp" else 2)  # the last layer is only an mtp module's
    for step in (1, -1):
        moved = [i + step for i in ids]
        if -1 <= moved[0] and moved[-1] <= last:
            name = f"layer offset {step:+d}: target_layer_ids {moved} instead of {list(ids)}"
            yield Reading(name, replace(config, target_layer_ids=tuple(moved)))
    if config.kind != "parallel":
        yield Reading("inputs the other way round: the feature before the embedding", config, swapped=True)
        yield from (map_reading(config, origin, d2t) for origin, d2t in maps.items())
        return
    for step in (1, -1):
        yield Reading(f"block shifted by one: its positions begin at p{step:+d} instead of p", config, offset=step)
    if config.sample_from_anchor and G > 1 and (not config.markov_rank or config.markov_head_type != "rnn"):
        changed = replace(config, sample_from_anchor=False, block_size=G - 1)
        yield Reading(
            "anchor slot: sample_from_anchor false (slot k predicts the token at p+k) instead of true", changed
        )
    elif not config.sample_from_anchor:
        changed = replace(config, sample_from_anchor=True, block_size=G + 1)
        yield Reading(
            "anchor slot: sample_from_anchor true (slot k predicts the token at p+k+1) instead of false", changed
        )
    yield from (map_reading(config, origin, d2t) for origin, d2t in maps.items())
    if config.markov_rank:
        without = replace(config, markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False)
        yield Reading("wrong head type: without the Markov head (markov_rank 0)", without)
        yield Reading("Markov head one token late: slot k sees the token at p+k-1 instead of p+k", config, delayed=True)


def map_reading(config: DraftConfig | ArConfig, origin: str, d2t: Tensor) -> Reading:
    return Reading(f"d2t missing or not this draft's: {origin}", config, d2t=d2t)


def mask_candidates(config: DraftConfig, special: list[int]) -> list[int]:
    """Ids worth a trial as mask token: all of a tiny vocabulary, else special tokens, known ones, the last ids."""
    V = config.decoder.vocab_size
    near = [*special, *MASK_IDS, V - 1, V - 2, *(config.mask_token_id + step for step in (-1, 1))]
    ids = range(V) if V <= 256 else dict.fromkeys(near)
    return [i for i in ids if 0 <= i < V and i != config.mask_token_id]


def mask_reading(config: DraftConfig, mask: int) -> Reading:
    return Reading(
        f"wrong mask id: mask_token_id {mask} instead of {config.mask_token_id}", replace(config, mask_token_id=mask)
    )


def best_mask(draft: DraftModel, config: DraftConfig, texts: list[Text], special: list[int]) -> Trial | None:
    """The mask token that accepts most, found on a few anchors and then tried on all; None without candidates."""
    if config.kind != "parallel":
        return None
    few = [accepted(draft, mask_reading(config, i), texts[:3], most=16) for i in mask_candidates(config, special)]
    return accepted(draft, max(few, key=lambda t: t.mean).reading, texts) if few else None


@torch.inference_mode()
def map_from_heads(draft_head: Tensor, target_head: Tensor) -> Tensor | None:
    """Offsets [V_d] of the target rows that the draft's lm_head rows [V_d, d] resemble most (cosine, means taken out);
    a head begins as the target's rows, and training moves them little. None where the rows found do not increase."""
    centred = lambda w: torch.nn.functional.normalize(w.float() - w.float().mean(0), dim=-1)
    ours, theirs = centred(draft_head), centred(target_head)
    ids = torch.cat([(rows @ theirs.t()).argmax(-1) for rows in ours.split(256)])
    wrong = int((ids[1:] <= ids[:-1]).sum())
    return ids - torch.arange(len(ids)) if wrong <= len(ids) // 20 else None
