"""The sequential head and the confidence head against DraftModel; the inverse CDF against float64."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from export.graph import Graph
from export.heads import SHORT_ROW, build_confidence, build_markov, inverse_cdf
from export.parity import Runner
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft
from training.draft import DraftModel


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target") / "t")


def feeds_for(draft: DraftModel, R: int, temperature: float) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    G, d = draft.config.block_size, draft.config.decoder.hidden_size
    hidden = torch.tensor(rng.standard_normal((R, G, d), dtype=np.float32))
    temperatures = np.full(R, temperature, np.float32)
    temperatures[::3] = 0
    return hidden, dict(
        hidden=hidden.numpy(), base_logits=draft.lm_head(hidden).numpy(), anchor_ids=rng.integers(0, 64, R),
        temperature=temperatures, uniforms=(rng.integers(0, 2**23, (R, G)) / 2**23).astype(np.float32),
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"head": "gated"}, {"head": "rnn"}, {"rank": 0}, {"draft_vocab": 40, "head": "rnn"}, {"block_size": 1}],
    ids=["vanilla", "gated", "rnn", "dflash", "trimmed", "one slot"],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_markov_draws_what_sample_block_draws(tmp_path, target, options, temperature):
    draft = load_draft(make_draft(tmp_path / "draft", target, **options))
    graph = build_markov(draft)
    graph.save(tmp_path / "graph")
    hidden, feeds = feeds_for(draft, 30, temperature)
    got = Runner(tmp_path / "graph", graph)(**feeds)
    tensors = {k: torch.tensor(v) for k, v in feeds.items()}
    want = draft.sample_block(hidden, tensors["anchor_ids"], tensors["temperature"], tensors["uniforms"])
    np.testing.assert_array_equal(got["draft_tokens"], want.tokens.numpy())
    np.testing.assert_array_equal(draft.draft_to_target().numpy()[got["draft_indices"]], got["draft_tokens"])
    divisor = torch.where(tensors["temperature"] > 0, tensors["temperature"], 1.0)[:, None, None]
    np.testing.assert_allclose(got["draft_probs"], torch.softmax(want.logits / divisor, -1).numpy(), atol=1e-6)
    assert ("markov_embeddings" in got) == (draft.config.markov_rank > 0)


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


@pytest.mark.parametrize("size", [7, SHORT_ROW, 2 * SHORT_ROW, 4099, 49152])
def test_inverse_cdf_is_exact_at_any_size(tmp_path, size):
    """Against a float64 running sum; a float32 one over 49152 weights is wrong in 4% of the draws."""
    g = Graph("draw")
    g.op("Identity", inverse_cdf(g, g.input("w", "float32", ("R", size)), g.input("u", "float32", ("R", 1)), size), out="i")
    g.output("i", "int64", ("R", 1))
    g.save(tmp_path)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    w = np.exp(3 * rng.standard_normal((200, size), dtype=np.float32))
    w[:, ::3] = 0
    u = (rng.integers(0, 2**23, (200, 1)) / 2**23).astype(np.float32)
    u[0], u[1] = 0, 1 - 2.0**-23
    index = session.run(None, {"w": w, "u": u})[0]
    cdf = w.astype(np.float64).cumsum(-1)
    want = (cdf <= u * cdf[:, -1:]).sum(-1, keepdims=True)
    assert (index == want).mean() >= 0.98
    assert (np.take_along_axis(w, index, 1) > 0).all()
    assert session.run(None, {"w": w[:0], "u": u[:0]})[0].shape == (0, 1)
