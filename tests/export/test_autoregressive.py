"""The rows' and the steps' graphs of an autoregressive draft against ArDraft, their caches filled step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.autoregressive import pack_rows, steps_after
from engines.base import BackboneResult, MarkovBatch
from export.__main__ import draft_graphs
from export.lower_onnxruntime import lower
from export.parity_steps import block_logits
from export.quantize import quantize
from export.runner import MASKED, Runner
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft

C, R = 64, 3
UNIFORMS = (np.random.default_rng(7).integers(0, 2**23, (R, 8)) / 2**23).astype(np.float32)
KINDS = {
    "eagle3": dict(kind="eagle3"),
    "mtp": dict(kind="mtp", draft_vocab=40),
    "two layers": dict(kind="eagle3", layers=2, draft_vocab=40),
    "three layers": dict(kind="mtp", layers=3, block_size=6),
    "one token": dict(kind="mtp", block_size=1),
}


def draft_of(folder, options, family="llama"):
    target = make_target(folder / "target", family=family)
    return load_draft(make_draft(folder / "draft", target, **options), target)


class Pair:
    """A draft's two graphs, sharing caches of R rows; `say` gives each request's rows so far."""

    def __init__(self, draft, folder, static_cache=None, dtype="fp32", seed=0):
        self.draft, self.rng, self.depth = draft, np.random.default_rng(seed), draft.config.decoder.num_hidden_layers
        graphs = draft_graphs(draft, 256, static_cache=static_cache)
        for graph in graphs:
            if dtype == "int8":
                quantize(graph)
            if static_cache is None:
                lower(graph)
            graph.save(folder / graph.name)
        rows, steps = graphs
        self.graphs, self.rows = graphs, Runner(folder / rows.name, rows, R, static_cache or C)
        self.steps = Runner(folder / steps.name, steps, caches=self.rows.caches)
        self.width, self.V = rows.inputs[0].shape[1], draft.config.decoder.vocab_size
        self.features, self.ids = [torch.zeros(0, self.width)] * R, [torch.zeros(0, dtype=torch.int64)] * R

    def say(self, counts):
        """New rows for each request: (batch, the backbone's result)."""
        new = [torch.tensor(self.rng.standard_normal((k, self.width), dtype=np.float32)) for k in counts]
        ids = [torch.tensor(self.rng.integers(0, self.V, k)) for k in counts]
        lengths = np.array([len(f) for f in self.features])
        self.features = [torch.cat(pair) for pair in zip(self.features, new)]
        self.ids = [torch.cat(pair) for pair in zip(self.ids, ids)]
        pieces, following = [[f.numpy()] for f in new], [i.tolist() for i in ids]
        batch = pack_rows(pieces, following, np.array(counts), lengths, self.depth, C, 256)
        return batch, BackboneResult(**self.rows(**added(batch)))

    def draw(self, batch, newest, request=1, runner=None):
        """What the steps give; `request` draws at temperature 1, by UNIFORMS[1], the others take the argmax."""
        G = self.draft.config.block_size
        draws = MarkovBatch.greedy(newest.hidden, newest.base_logits, np.zeros(R, np.int64), self.V, G)
        own = dict(sample_index=np.array([request]), temperature=np.ones(1, np.float32), uniforms=UNIFORMS[1:2, :G])
        batch = steps_after(batch, newest, MarkovBatch(**{**draws.__dict__, **own}))
        return (runner or self.steps)(**added(batch))

    def reference(self, r):
        """(the last row's hidden [1, d], ArDraft's rows) of request r."""
        rows = self.draft.rows(self.features[r][None], self.ids[r][None])
        return rows.hidden[0, -1:], rows


def added(batch):
    """A batch as the graphs want it: masks that are added."""
    masks = {name: mask for name, mask in batch.__dict__.items() if name.startswith("mask") and mask is not None}
    return batch.__dict__ | {name: np.where(mask, np.float32(0), MASKED) for name, mask in masks.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_rows_and_steps_equal_pytorch(tmp_path, family, options):
    draft = draft_of(tmp_path, options, family)
    pair, G = Pair(draft, tmp_path), draft.config.block_size
    for counts in ((7, 3, 1), (1, 5, 2), (0, 2, 1)):
        batch, newest = pair.say(counts)
        block = pair.draw(batch, newest)
        for r in range(R):
            if not counts[r]:
                continue
            hidden, rows = pair.reference(r)
            np.testing.assert_allclose(newest.hidden[r], hidden.numpy(), atol=1e-4)
            np.testing.assert_allclose(newest.base_logits[r], draft.lm_head(draft.norm(hidden)).numpy(), atol=1e-4)
            S = len(pair.features[r])
            want = draft.sample_block(
                hidden, torch.tensor([S]), rows.caches, torch.zeros(1, S), torch.tensor([float(r == 1)]),
                torch.tensor(UNIFORMS[r : r + 1]),
            )  # fmt: skip
            np.testing.assert_array_equal(block["draft_tokens"][r], want.tokens[0].numpy())
            if r == 1:
                np.testing.assert_allclose(block["draft_probs"], torch.softmax(want.logits, -1).numpy(), atol=1e-5)
        assert block["draft_tokens"].shape == (R, G)
        np.testing.assert_array_equal(draft.draft_to_target().numpy()[block["draft_indices"]], block["draft_tokens"])


def test_steps_leave_the_caches_as_they_are(tmp_path):
    pair = Pair(draft_of(tmp_path, KINDS["two layers"]), tmp_path)
    assert not [s for s in pair.graphs[1].outputs if s.name.startswith("present.")]
    batch, newest = pair.say((7, 3, 1))
    before = {name: cache.numpy().copy() for name, cache in pair.rows.caches.items()}
    pair.draw(batch, newest)
    for name, cache in pair.rows.caches.items():
        np.testing.assert_array_equal(cache.numpy(), before[name])


@pytest.mark.parametrize("options", [KINDS["eagle3"], KINDS["two layers"]], ids=["one layer", "two layers"])
def test_the_static_form_reads_to_the_mask_only(tmp_path, options):
    draft = draft_of(tmp_path, options)
    pairs = Pair(draft, tmp_path / "linear"), Pair(draft, tmp_path / "static", static_cache=128)
    for cache in pairs[1].rows.caches.values():
        cache.update_inplace(np.full(cache.numpy().shape, 1e6, np.float32))  # seen, it would drown everything
    results = []
    for pair in pairs:
        batch, newest = pair.say((9, 4, 1))
        results.append((newest, pair.draw(batch, newest)))
    (a, block_a), (b, block_b) = results
    np.testing.assert_allclose(a.hidden, b.hidden, atol=1e-5)
    np.testing.assert_array_equal(block_a["draft_tokens"], block_b["draft_tokens"])


def test_int8_steps_hold_each_weight_once_and_stay_near(tmp_path):
    draft = draft_of(tmp_path, KINDS["eagle3"])
    pair = Pair(draft, tmp_path, dtype="int8")
    weights = pair.graphs[1].weights
    assert [name for name in weights if name.startswith("lm_head.")] == ["lm_head.T.int8.packed", "lm_head.T.scale.packed"]
    batch, newest = pair.say((9, 4, 6))
    block = pair.draw(batch, newest)
    hidden, rows = pair.reference(1)
    logits = block_logits(draft, hidden[None], 3, rows, torch.tensor(block["draft_tokens"][1]))
    want, got = torch.softmax(torch.tensor(logits), -1).numpy(), block["draft_probs"][0]
    assert 0 < np.abs(got - want).max() < 0.05
    products = [node.op_type for graph in pair.graphs for node in graph.nodes if node.op_type.startswith("MatMul")]
    assert "MatMulNBits" in products and "MatMulIntegerToFloat" not in products  # one step a row is too coarse


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("options", [KINDS["eagle3"], KINDS["three layers"]], ids=["eagle3", "mtp"])
def test_a_block_has_the_same_bits_in_any_batch(tmp_path, options, dtype):
    """Beside neighbours of any length, and in rows that came in pieces: what a seed draws must depend on neither."""
    pair = Pair(draft_of(tmp_path, options), tmp_path, dtype=dtype)
    batch, newest = pair.say((2, 11, 3))
    together = newest.hidden[1].copy(), pair.draw(batch, newest)["draft_probs"][0].copy()
    alone = Runner(tmp_path / "backbone", pair.graphs[0], 1, C)
    features, ids = pair.features[1], pair.ids[1]
    for start, stop in ((0, 6), (6, 7), (7, 11)):
        one, counts, lengths = [[features[start:stop].numpy()]], np.array([stop - start]), np.array([start])
        batch = pack_rows(one, [ids[start:stop].tolist()], counts, lengths, pair.depth, C, 256)
        newest = BackboneResult(**alone(**added(batch)))
    np.testing.assert_array_equal(newest.hidden[0], together[0])
    steps = Runner(tmp_path / "markov", pair.graphs[1], caches=alone.caches)
    np.testing.assert_array_equal(pair.draw(batch, newest, request=0, runner=steps)["draft_probs"][0], together[1])
