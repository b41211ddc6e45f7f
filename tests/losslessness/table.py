"""A language model that is a table: exact probabilities, and engines fast enough for hundreds of thousands of draws.

Knows: the target, backbone and confidence engines as look-ups in numpy, over caches that keep tokens. Refuses to know:
the accept rule, sampling, schedules. Those are the shipped ones: `markov` and `verify` run the exported graphs, and
everything above the engines is the real loop.

The model. Target: logits of the next token from the last two tokens. Draft: base logits of slot k from the anchor and
the token before it, plus the Markov head's bias for x_{k-1}. Confidence of slot k: from the same and x_{k-1}.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from rich.console import Console

import engines
from engines.base import BackboneBatch, BackboneResult, ConfidenceBatch, ConfidenceResult, TargetBatch, TargetResult
from export.__main__ import export
from tests.tiny import decoder_config, make_target, randomize
from training.checkpoint import save_draft
from training.draft import DraftConfig, DraftModel

V, EOS, G = 8, 7, 4
NEVER = -60.0  # a logit whose token is never drawn (e^-60)


@dataclass(frozen=True)
class Table:
    """target [V, V, V]: logits after (token before, token). base [G, V, V, V_d]: draft base logits of slot k after
    (token before the anchor, anchor). confidence [G, V, V, V]: logits of c_k after the same and x_{k-1} (the anchor at
    slot 0)."""

    target: ndarray
    base: ndarray
    confidence: ndarray

    def changed(self, **parts: ndarray) -> Table:
        return replace(self, **parts)


class TableEngines:
    """`engines.base.Engines` over a Table; `graphs` is a loaded bundle whose markov and verify engines are used as they
    are."""

    verify_rows = None  # one call for any number of rows
    pass_limits = None

    def __init__(self, graphs: engines.Engines, table: Table):
        self.graphs, self.table = graphs, table
        d = graphs.bundle.draft
        self.width, self.hidden_size = (
            len(d.layer_ids) * graphs.bundle.target.hidden_size,
            graphs.bundle.target.hidden_size,
        )
        self.target_capacity = self.draft_capacity = 0
        self.tokens = np.zeros((0, 0), np.int64)  # [rows, C]: the target's cache
        self.context = np.zeros((0, 0), np.int64)  # [rows, C]: the draft's cache, the token of each context position

    def __getattr__(self, name: str):
        return getattr(self.graphs, name)

    def target(self, batch: TargetBatch) -> TargetResult:
        R, Q = batch.pad_index.shape
        first = batch.first_row
        columns = batch.write_index[:, None] + np.arange(Q)
        assert columns.max() < self.target_capacity, "write_index + Q <= C"
        self.tokens[first + np.arange(R)[:, None], columns] = batch.token_ids[batch.pad_index]
        row, slot = np.divmod(batch.pack_index, Q)
        position = batch.write_index[row] + slot
        before = np.where(position > 0, self.tokens[first + row, position - 1], 0)
        features = np.zeros((len(before), self.width), np.float32)
        features[:, 0] = batch.token_ids
        rows = batch.logit_rows
        return TargetResult(logits=self.table.target[before[rows], batch.token_ids[rows]], features=features)

    def backbone(self, batch: BackboneBatch) -> BackboneResult:
        R, Q = batch.pad_index.shape
        columns = batch.write_index[:, None] + np.arange(Q)
        assert columns.max() < self.draft_capacity, "write_index + Q <= C"
        block = np.full(R * G, -1.0, np.float32)  # block rows: never read back, the next pass overwrites them
        written = np.concatenate([batch.features[:, 0], block])[batch.pad_index]
        rows = batch.first_row + np.arange(R)
        self.context[rows[:, None], columns] = written
        anchor = batch.block_position_ids[:, 0]
        before = self.context[rows, np.maximum(anchor - 1, 0)].clip(min=0)
        hidden = np.zeros((R, G, self.hidden_size), np.float32)
        hidden[:, :, 0], hidden[:, :, 1] = before[:, None], batch.anchor_ids[:, None]
        base = self.table.base[np.arange(G), before[:, None], batch.anchor_ids[:, None]]
        return BackboneResult(hidden=hidden, base_logits=np.ascontiguousarray(base))

    def confidence(self, batch: ConfidenceBatch) -> ConfidenceResult:
        before, anchor = batch.hidden[:, :, 0].astype(np.int64), batch.hidden[:, :, 1].astype(np.int64)
        previous = batch.markov_embeddings.argmax(axis=-1)  # W_1 is the identity
        return ConfidenceResult(confidence_logits=self.table.confidence[np.arange(G), before, anchor, previous])

    def ensure_capacity(self, rows: int, length: int) -> None:
        have = self.tokens.shape
        if rows > have[0] or length > have[1]:
            size = max(rows, have[0]), max(2 * length, have[1])
            for name in ("tokens", "context"):
                grown = np.zeros(size, np.int64)
                grown[: have[0], : have[1]] = getattr(self, name)
                setattr(self, name, grown)
            self.target_capacity = self.draft_capacity = size[1]

    def move_row(self, source: int, destination: int, target_length: int, draft_length: int) -> None:
        self.tokens[destination, :target_length] = self.tokens[source, :target_length]
        self.context[destination, :draft_length] = self.context[source, :draft_length]

    def close(self) -> None: ...


def graphs(folder: Path, *, draft_vocab: int | None = None, bigrams: ndarray | None = None) -> engines.Engines:
    """A loaded bundle with the markov and verify graphs of a table: W_1 = identity, W_2 = bigrams [V_d, V] (None:
    zero)."""
    target = make_target(folder / "target", vocab=V, layers=2, eos=EOS)
    model = DraftModel(DraftConfig(
        decoder=decoder_config("llama", V, 1), block_size=G, mask_token_id=V - 2, target_layer_ids=(-1, 0),
        num_target_layers=2,
        markov_rank=V, markov_head_type="vanilla", enable_confidence_head=True, confidence_head_with_markov=True,
        draft_vocab_size=draft_vocab,
    ))  # fmt: skip
    randomize(model, seed=1)
    model.markov_head.markov_w1.weight.copy_(torch.eye(V))
    V_d = draft_vocab or V
    model.markov_head.markov_w2.weight.copy_(torch.tensor(np.zeros((V_d, V)) if bigrams is None else bigrams))
    if draft_vocab:
        model.d2t.copy_(torch.tensor(DRAFT_TO_TARGET[:draft_vocab]) - torch.arange(draft_vocab))
    save_draft(model, folder / "draft")
    export(target, folder / "draft", folder / "bundle", console=Console(file=io.StringIO()))
    return engines.load(folder / "bundle", threads=1)


DRAFT_TO_TARGET = np.array([0, 1, 2, 4, 6])  # of a trimmed draft vocabulary of 5


def jagged_table(seed: int, bigrams: ndarray, to_target: ndarray, *, closeness: float = 1.0) -> Table:
    """A random table. The draft knows slot 0's target logits up to noise and later slots by the bigrams; the confidence
    depends strongly on x_{k-1}, on the anchor and on the slot."""
    rng = np.random.default_rng(seed)
    target = rng.normal(0, 1.2, (V, V, V)).astype(np.float32)
    target[:, :, 5] -= 3  # one rare token
    bias = bigrams.T[None]  # [1, V (anchor), V_d]
    first = closeness * target[:, :, to_target] - bias + rng.normal(0, 0.6, (V, V, len(to_target)))
    later = rng.normal(0, 0.5, (G - 1, V, V, len(to_target)))
    base = np.concatenate([first[None], later]).astype(np.float32)
    confidence = (1.0 + rng.normal(0, 1.0, (G, V, V, 1)) + rng.normal(0, 2.0, (G, 1, 1, V))).astype(np.float32)
    confidence[0] = confidence[0, :, :, :1]
    return Table(target, base, confidence)


def mean_bigrams(seed: int, to_target: ndarray) -> ndarray:
    """[V_d, V] bias: rows of random logits a table's target shares on average."""
    return np.random.default_rng(seed).normal(0, 0.8, (len(to_target), V)).astype(np.float32)
