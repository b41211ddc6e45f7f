"""The sequential head and the confidence head against DraftModel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.heads import build_confidence, build_markov
from export.runner import Runner
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft
from training.draft import DraftModel


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target") / "t")


def feeds_for(draft: DraftModel, R: int, temperature: float) -> tuple:
    rng = np.random.default_rng(0)
    G, d = draft.config.block_size, draft.config.decoder.hidden_size
    hidden = torch.tensor(rng.standard_normal((R, G, d), dtype=np.float32))
    temperatures = np.full(R, temperature, np.float32)
    temperatures[::3] = 0
    uniforms = (rng.integers(0, 2**23, (R, G)) / 2**23).astype(np.float32)
    sampled = np.flatnonzero(temperatures)
    return hidden, temperatures, uniforms, dict(
        hidden=hidden.numpy(), base_logits=draft.lm_head(hidden).numpy(), anchor_ids=rng.integers(0, 64, R), sample_index=sampled,
        temperature=temperatures[sampled], uniforms=uniforms[sampled], match_index=np.zeros(0, np.int64),
        match_temperature=np.zeros(0, np.float32), noise=np.zeros((0, G, draft.config.decoder.vocab_size), np.float32),
    )


def run(draft: DraftModel, folder, feeds):
    graph = build_markov(draft)
    graph.save(folder)
    return Runner(folder, graph)(**feeds)


@pytest.mark.parametrize(
    "options",
    [{}, {"head": "gated"}, {"head": "rnn"}, {"rank": 0}, {"draft_vocab": 40, "head": "rnn"}, {"block_size": 1}],
    ids=["vanilla", "gated", "rnn", "dflash", "trimmed", "one slot"],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_markov_draws_what_sample_block_draws(tmp_path, target, options, temperature):
    draft = load_draft(make_draft(tmp_path / "draft", target, **options))
    hidden, temperatures, uniforms, feeds = feeds_for(draft, 30, temperature)
    got = run(draft, tmp_path / "graph", feeds)
    want = draft.sample_block(hidden, *map(torch.tensor, (feeds["anchor_ids"], temperatures, uniforms)))
    np.testing.assert_array_equal(got["draft_tokens"], want.tokens.numpy())
    np.testing.assert_array_equal(draft.draft_to_target().numpy()[got["draft_indices"]], got["draft_tokens"])
    sampled = feeds["sample_index"]
    np.testing.assert_allclose(got["draft_probs"], torch.softmax(want.logits[sampled] / temperature, -1).numpy(), atol=1e-6)
    assert ("markov_embeddings" in got) == (draft.config.markov_rank > 0)


@pytest.mark.parametrize("options", [{}, {"draft_vocab": 40, "head": "rnn"}], ids=["whole", "trimmed"])
def test_a_matched_request_picks_by_the_noise_of_the_target_tokens(tmp_path, target, options):
    """Step by step: the argmax of logits / T + noise at the draft tokens' target ids, each step given the pick before it."""
    draft = load_draft(make_draft(tmp_path / "draft", target, **options))
    hidden, _, _, feeds = feeds_for(draft, 6, 1.0)
    G, to_target = draft.config.block_size, draft.draft_to_target().numpy()
    noise = np.random.default_rng(1).gumbel(size=(2, G, 64)).astype(np.float32)
    empty = dict(sample_index=np.zeros(0, np.int64), temperature=np.zeros(0, np.float32), uniforms=np.zeros((0, G), np.float32))
    matched = np.array([1, 4])
    temperature = np.array([0.8, 1.3], np.float32)
    feeds |= {**empty, "match_index": matched, "match_temperature": temperature, "noise": noise}
    got = run(draft, tmp_path / "graph", feeds)
    previous = np.column_stack([feeds["anchor_ids"], got["draft_tokens"][:, :-1]])
    logits = draft.corrected_logits(hidden, torch.tensor(previous))[0].detach().numpy()
    want = logits.argmax(-1)
    want[matched] = (logits[matched] / temperature[:, None, None] + noise[..., to_target]).argmax(-1)
    np.testing.assert_array_equal(got["draft_indices"], want)
    assert (want[matched] != logits[matched].argmax(-1)).any() and got["draft_probs"].shape[0] == 0


@pytest.mark.parametrize("confidence", ["markov", "hidden", None])
def test_confidence(tmp_path, target, confidence):
    draft = load_draft(make_draft(tmp_path / "draft", target, confidence=confidence))
    graph = build_confidence(draft)
    graph.save(tmp_path / "graph")
    rng = np.random.default_rng(0)
    G = draft.config.block_size
    hidden = torch.tensor(rng.standard_normal((5, G, 32), dtype=np.float32))
    embeddings = draft.markov_head.embed(torch.tensor(rng.integers(0, 64, (5, G))))
    got = Runner(tmp_path / "graph", graph)(hidden=hidden.numpy(), markov_embeddings=embeddings.numpy())["confidence_logits"]
    want = np.full((5, G), 20.0) if confidence is None else draft.confidence(hidden, embeddings).numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert {s.name for s in graph.inputs} == ({"hidden", "markov_embeddings"} if confidence == "markov" else {"hidden"})
