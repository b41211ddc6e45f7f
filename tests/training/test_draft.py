"""The draft module beyond the oracle's two: heads, layer id -1, trimmed vocabulary; blocks at once = one at a time."""

import pytest
import torch

from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft
from training.draft import block_attention, sample_inverse_cdf

KINDS = {
    "vanilla": {},
    "gemma4": {"family": "gemma4-12b", "layers": 2},
    "plain layers for gemma4": {"family": "gemma4-e", "plain": True, "draft_vocab": 24},
    "gated": {"head": "gated"},
    "rnn": {"head": "rnn"},
    "dflash": {"rank": 0, "confidence": "hidden"},
    "confidence without Markov": {"confidence": "hidden"},
    "no confidence": {"confidence": None},
    "layer -1, trimmed": {"layer_ids": (-1, 0, 1), "draft_vocab": 24},
}


@pytest.fixture(scope="module", params=KINDS)
def draft(request, tmp_path_factory):
    folder, options = tmp_path_factory.mktemp("models"), dict(KINDS[request.param])
    target = make_target(folder / "target", family=options.pop("family", "llama"))
    return load_draft(make_draft(folder / "draft", target, **options))


def random_features(draft, B, S, seed=0):
    c = draft.config
    width = len(c.target_layer_ids) * c.decoder.hidden_size
    return torch.randn(B, S, width, generator=torch.Generator().manual_seed(seed))


def test_all_blocks_at_once_equal_each_alone(draft):
    features = random_features(draft, 2, 12)
    anchors, positions = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[3, 12, 7], [1, 4, 0]])
    hidden = draft.backbone(features, anchors, positions)
    for b in range(2):
        for a in range(3):
            p = int(positions[b, a])
            alone = draft.backbone(features[b, None, :p], anchors[b, None, a, None], positions[b, None, a, None])
            torch.testing.assert_close(hidden[b, a], alone[0, 0], atol=1e-5, rtol=1e-5)


def test_features_at_and_behind_the_anchor_are_not_seen(draft):
    features = random_features(draft, 1, 12)
    anchors, positions = torch.tensor([[5]]), torch.tensor([[6]])
    hidden = draft.backbone(features, anchors, positions)
    changed = features.clone()
    changed[:, 6:] += 1
    assert torch.equal(hidden, draft.backbone(changed, anchors, positions))
    changed[:, 5] += 1
    assert not torch.allclose(hidden, draft.backbone(changed, anchors, positions), atol=1e-4)


def test_teacher_forcing_its_own_tokens_gives_the_sampled_block(draft):
    R, G = 3, draft.config.block_size
    hidden = torch.randn(R, G, draft.config.decoder.hidden_size, generator=torch.Generator().manual_seed(1))
    anchors = torch.tensor([4, 9, 20])
    uniforms = torch.rand(R, G, generator=torch.Generator().manual_seed(2))
    block = draft.sample_block(hidden, anchors, torch.tensor([0.0, 1.0, 0.7]), uniforms)
    previous = torch.cat([anchors[:, None], block.tokens[:, :-1]], dim=1)
    logits, confidence = draft.corrected_logits(hidden, previous)
    torch.testing.assert_close(block.logits, logits, atol=1e-5, rtol=1e-5)
    if draft.config.enable_confidence_head:
        torch.testing.assert_close(block.confidence, confidence, atol=1e-5, rtol=1e-5)
    else:
        assert block.confidence is None and confidence is None
    greedy = draft.draft_to_target()[block.logits[0].argmax(-1)]
    assert torch.equal(block.tokens[0], greedy)
    assert set(block.tokens.flatten().tolist()) <= set(draft.draft_to_target().tolist())


def test_the_rnn_state_carries_the_prefix_and_the_other_heads_do_not(draft):
    if not draft.config.markov_rank:
        pytest.skip("DFlash has no Markov head")
    g = torch.Generator().manual_seed(3)
    G, d = draft.config.block_size, draft.config.decoder.hidden_size
    hidden, previous = torch.randn(1, G, d, generator=g), torch.tensor([[4, 5, 6, 7]])
    other = previous.clone()
    other[0, 0] = 30
    a, b = (draft.corrected_logits(hidden, p)[0][0, -1] for p in (previous, other))
    assert torch.equal(a, b) == (draft.config.markov_head_type != "rnn")


def test_the_gate_and_rnn_formulas(tmp_path):
    target = make_target(tmp_path / "target")
    gated = load_draft(make_draft(tmp_path / "gated", target, head="gated")).markov_head
    e, h = torch.randn(5, 16), torch.randn(5, 32)
    W, b = gated.gate_proj.weight, gated.gate_proj.bias
    expected = torch.sigmoid(h @ W[:, :32].T + e @ W[:, 32:].T + b) * e
    torch.testing.assert_close(gated.step(e, e, h)[1], expected)
    rnn = load_draft(make_draft(tmp_path / "rnn", target, head="rnn")).markov_head
    s = torch.randn(5, 16)
    W, b = rnn.joint_proj.weight, rnn.joint_proj.bias
    z = s @ W[:, :16].T + e @ W[:, 16:32].T + h @ W[:, 32:].T + b
    gate = torch.sigmoid(z[:, :16])
    state, latent = rnn.step(s, e, h)
    torch.testing.assert_close(state, gate * s + (1 - gate) * torch.tanh(z[:, 16:32]))
    torch.testing.assert_close(latent, torch.tanh(z[:, 32:]))


def test_block_attention_equals_plain_attention():
    g = torch.Generator().manual_seed(4)
    B, S, A, G, H, KV, D = 2, 5, 3, 4, 4, 2, 8
    q = torch.randn(B, A * G, H, D, generator=g)
    kc, vc = torch.randn(2, B, S, KV, D, generator=g)
    kb, vb = torch.randn(2, B, A * G, KV, D, generator=g)
    visible = torch.rand(B, A, S, generator=g) < 0.5
    got = block_attention(q, kc, vc, kb, vb, torch.zeros(B, A, S).masked_fill(~visible, -torch.inf), G)
    own = torch.arange(A * G)[:, None] // G == torch.arange(A * G) // G
    mask = torch.cat([visible.repeat_interleave(G, 1), own.expand(B, -1, -1)], dim=-1)[:, None]
    k, v = torch.cat([kc, kb], 1).transpose(1, 2), torch.cat([vc, vb], 1).transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)


def test_inverse_cdf_draws_each_token_with_its_probability():
    logits = torch.tensor([0.1, 0.2, 0.7]).log()
    n = 10_000
    uniforms = (torch.arange(n) + 0.5) / n
    drawn = sample_inverse_cdf(logits.expand(n, 3), torch.ones(n), uniforms)
    assert (drawn.bincount(minlength=3) / n).tolist() == pytest.approx([0.1, 0.2, 0.7], abs=2 / n)
    assert int(sample_inverse_cdf(logits[None], torch.zeros(1), torch.tensor([0.0]))) == 2
