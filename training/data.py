"""Batches for the trainer, and the frozen target's side of them (features, hidden states), remembered within bounds.

Knows: how sequences are grouped, held out and padded; what the losses need of the target. Refuses to know: drafts,
gradients, how sequences were made.

Legend: B sequences, S positions (the longest of the batch), L*d feature width, d hidden size, V_d draft vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from training.feature_files import FeatureFiles
from training.layers import softcapped
from training.target import PackedBatch, TargetModel

HELD_OUT_SHARE = 32  # one prompt in so many, chosen by its hash, is never trained on


class Sequence(Protocol):
    """tokens [T]: prompt + answer; the answer is tokens[prompt_length:]."""

    tokens: np.ndarray
    prompt_length: int


@dataclass(frozen=True)
class Batch:
    """tokens [B, S] int64 (0 behind a sequence's end), loss_mask [B, S] bool (answer tokens), lengths [B]."""

    tokens: Tensor
    loss_mask: Tensor
    lengths: list[int]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.loss_mask.to(device), self.lengths)


@dataclass(frozen=True)
class TargetSide:
    """What the frozen target says of a batch: features [B, S, L*d], last_hidden [B, S, d] (after the final norm) in the
    target's dtype, outside [B, S] float32 = logsumexp of the logits outside the draft vocabulary (None if it has
    all)."""

    features: Tensor
    last_hidden: Tensor
    outside: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """By field; `outside` is left out where it is None."""
        named = {"features": self.features, "last_hidden": self.last_hidden, "outside": self.outside}
        return {name: t for name, t in named.items() if t is not None}

    def to(self, device: torch.device) -> TargetSide:
        return TargetSide(**{"outside": None, **{name: t.to(device) for name, t in self.tensors().items()}})


def is_held_out(sequence: Sequence) -> bool:
    """By the hash of the prompt, so that every answer to one prompt falls on the same side."""
    return is_held_out_prompt(sequence.tokens[: sequence.prompt_length])


def is_held_out_prompt(tokens: list[int] | np.ndarray) -> bool:
    """The same for a prompt's token ids [T]."""
    prompt = np.asarray(tokens, dtype=np.int32)
    return hashlib.sha256(prompt.tobytes()).digest()[0] % HELD_OUT_SHARE == 0


def sequence_key(sequence: Sequence) -> str:
    """Names a sequence by its content."""
    content = np.asarray([sequence.prompt_length, *sequence.tokens], dtype=np.int32).tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def make_batch(sequences: list[Sequence]) -> Batch:
    lengths = [len(s.tokens) for s in sequences]
    tokens = torch.zeros(len(sequences), max(lengths), dtype=torch.int64)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i, s in enumerate(sequences):
        tokens[i, : lengths[i]] = torch.from_numpy(np.asarray(s.tokens, dtype=np.int64))
        loss_mask[i, s.prompt_length : lengths[i]] = True
    return Batch(tokens, loss_mask, lengths)


def make_batches(sequences: list[Sequence], tokens_per_batch: int, max_length: int) -> list[Batch]:
    """Sequences sorted by length (then content: their order on disk plays no part) and cut into batches of about
    `tokens_per_batch` padded tokens.

    Sequences without two answer tokens inside max_length are left out; longer ones are cut. A batch keeps its
    sequences in all epochs (only the order of batches and the anchors change): what the target says of it can be kept.
    """
    usable = [s for s in sequences if min(len(s.tokens), max_length) - s.prompt_length >= 2]
    cut = [s if len(s.tokens) <= max_length else _Cut(s.tokens[:max_length], s.prompt_length) for s in usable]
    groups: list[list[Sequence]] = []
    for s in sorted(cut, key=lambda s: (len(s.tokens), np.asarray(s.tokens, dtype=np.int32).tobytes())):
        if not groups or len(s.tokens) * (len(groups[-1]) + 1) > tokens_per_batch:
            groups.append([])
        groups[-1].append(s)
    return [make_batch(g) for g in groups]


@dataclass(frozen=True)
class _Cut:
    tokens: np.ndarray
    prompt_length: int


def frequent_tokens(sequences: list[Sequence], size: int, vocab_size: int, always: tuple[int, ...] = ()) -> Tensor:
    """[size] int64, increasing: the most frequent answer tokens (ties: the smaller id), `always` among them."""
    counts = answer_counts(sequences, vocab_size)
    counts[list(always)] = np.iinfo(np.int64).max
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[: min(size, vocab_size)]))


def lacking_tokens(sequences: list[Sequence], ids: Tensor, size: int, vocab_size: int) -> Tensor:
    """[at most `size`] int64, increasing: the most frequent answer tokens (ties: the smaller id) that are not in `ids`;
    fewer where the answers have no more."""
    counts = answer_counts(sequences, vocab_size)
    counts[ids.numpy()] = 0
    size = min(size, int((counts > 0).sum()))
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def answer_counts(sequences: list[Sequence], vocab_size: int) -> np.ndarray:
    """[vocab_size] int64: how often the answers have each token."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for s in sequences:
        np.add.at(counts, np.asarray(s.tokens[s.prompt_length :], dtype=np.int64), 1)
    return counts


def coverage(sequences: list[Sequence], ids: Tensor, vocab_size: int) -> float:
    """Share of the answer tokens that lie in the draft vocabulary."""
    inside = np.zeros(vocab_size, dtype=bool)
    inside[ids.numpy()] = True
    hits = [inside[np.asarray(s.tokens[s.prompt_length :], dtype=np.int64)] for s in sequences]
    return float(np.concatenate(hits).mean()) if hits else 0.0


class TargetPass:
    """Runs the frozen target over batches, and remembers as many results as fit into `cache_bytes` of memory, then into
    `files`. Both hold a result as it was made: remembering changes nothing but time."""

    def __init__(self, target: TargetModel, draft_ids: Tensor, cache_bytes: int, files: FeatureFiles | None = None):
        self.target, self.cache_bytes, self.used, self.files = target, cache_bytes, 0, files
        V = target.config.vocab_size
        rest = torch.ones(V, dtype=torch.bool)
        rest[draft_ids] = False
        self.rest_head = target.lm_head.weight[rest].clone() if bool(rest.any()) else None
        self.cache: dict[int, TargetSide] = {}

    @classmethod
    def bytes_per_token(cls, target: TargetModel) -> int:
        width = target.config.hidden_size * (len(target.layer_ids) + 1)
        return width * target.embed_tokens.weight.element_size() + 4

    def forget(self, which: Callable[[int], bool] = lambda key: True) -> None:
        """Drops the results of the batches whose key is meant."""
        self.cache = {key: side for key, side in self.cache.items() if not which(key)}
        self.used = sum(side.nbytes for side in self.cache.values())
        if self.files is not None:
            self.files.forget(which)

    def __call__(self, batch: Batch, key: int | None = None) -> TargetSide:
        """The target's side on the batch's device. key: the batch's number, under which the result is kept (in host
        memory or a file); None keeps nothing."""
        device = batch.tokens.device
        if key is None:
            return self._run(batch)
        if key in self.cache:
            return self.cache[key].to(device)
        if self.files is not None and (kept := self.files.get(key)) is not None:
            return TargetSide(**{"outside": None, **kept}).to(device)
        side = self._run(batch)
        if self.used + side.nbytes <= self.cache_bytes:
            self.cache[key] = side.to(torch.device("cpu"))
            self.used += side.nbytes
        elif self.files is not None:
            self.files.put(key, side.to(torch.device("cpu")).tensors())
        return side

    def _rest_logits(self, hidden: Tensor) -> Tensor:
        """Of the tokens outside the draft's vocabulary."""
        return softcapped(hidden @ self.rest_head.t(), self.target.config.logit_softcap)

    @torch.no_grad()
    def _run(self, batch: Batch) -> TargetSide:
        B, S = batch.tokens.shape
        rows = [batch.tokens[b, :n].tolist() for b, n in enumerate(batch.lengths)]
        packed = PackedBatch.build(rows, [0] * B, S)
        out = self.target(packed, torch.zeros(0, dtype=torch.int64))
        spread = lambda x: x.new_zeros(B * S, x.shape[-1]).index_copy_(0, packed.pack_index, x).unflatten(0, (B, S))
        last, outside = spread(out.last_hidden), None
        if self.rest_head is not None:
            outside = torch.zeros(B, S)
            judged = last[batch.loss_mask]
            outside[batch.loss_mask] = torch.cat(
                [torch.logsumexp(self._rest_logits(h).float(), dim=-1) for h in judged.split(32)]
            )
        return TargetSide(spread(out.features), last, outside)
