"""EAGLE-3 and MTP modules: all anchors at once, step by step with caches, and without any cache: the same numbers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import decoder_config, randomize
from training.autoregressive import ArConfig, ArDraft
from training.evaluate import propose
from training.layers import rotate

V, G, S, LAYERS = 48, 4, 18, 4
SHAPES = [("eagle3", 1, "llama"), ("eagle3", 2, "qwen3"), ("mtp", 1, "qwen3"), ("mtp", 3, "llama")]


def make(kind, depth=1, family="llama", vocab=None):
    ids = (0, 2) if kind == "eagle3" else (LAYERS - 1,)
    draft = ArDraft(ArConfig(decoder_config(family, V, depth, bias=family == "llama"), kind, G, ids, LAYERS, vocab))
    randomize(draft, 7)
    if vocab:
        draft.d2t.copy_(torch.arange(vocab) + 1)  # token i is the target's 2i + 1
    return draft


def text(draft, B=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    width = len(draft.config.target_layer_ids) * draft.config.decoder.hidden_size
    return torch.randn(B, S, width, generator=g), torch.randint(0, V, (B, S), generator=g)


def plainly(draft, features, tokens, p):
    """Slots 0..G-1 behind tokens[..p], no cache, no anchors: before each slot every row is computed again. The rows of
    true features first, then one of the draft's own hidden state for each token behind the anchor. [G, d] normed."""
    config, out, stream = draft.config, [], list(draft.fuse(features[:p]))
    cos, sin = config.decoder.rope.tables(config.decoder.head_dim, S)
    for k in range(G):
        n = p + k  # rows 0..p-1, then k steps
        embedding, feature = draft.embed_tokens(tokens[1 : n + 1]), torch.stack(stream)
        if config.kind == "eagle3":
            x, first = feature, draft.layers[0]
            h = torch.cat([first.input_layernorm(embedding), first.hidden_norm(feature)], -1)
        else:
            x = draft.eh_proj(torch.cat([draft.enorm(embedding), draft.hnorm(feature)], -1))
            h = draft.layers[0].input_layernorm(x)
        for i, layer in enumerate(draft.layers):
            attn = layer.self_attn
            h = layer.input_layernorm(x) if i else h
            q, key = (rotate(part, cos[:n, None], sin[:n, None]) for part in (attn.queries(h), attn.keys(h)))
            heads = lambda t: t.transpose(0, 1)[None]
            o = F.scaled_dot_product_attention(
                heads(q), heads(key), heads(attn.values(h)), is_causal=True, enable_gqa=True
            )
            x = x + attn.o_proj(o[0].transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        stream.append(x[-1])
        out.append(draft.norm(x[-1]))
    return torch.stack(out)


@pytest.mark.parametrize("kind, depth, family", SHAPES)
def test_all_anchors_at_once_are_each_alone_without_a_cache(kind, depth, family):
    draft = make(kind, depth, family)
    features, tokens = text(draft)
    anchors = torch.tensor([[1, 6, 9], [13, 2, 5]])
    hidden = draft.unroll(features, tokens, anchors, G)
    for b, a in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        want = plainly(draft, features[b], tokens[b], int(anchors[b, a]))
        torch.testing.assert_close(hidden[b, a], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [None, 20])
@pytest.mark.parametrize("kind, depth, family", SHAPES)
def test_a_sampled_block_is_the_unrolled_one_at_the_same_tokens(kind, depth, family, vocab):
    draft = make(kind, depth, family, vocab)
    features, tokens = text(draft)
    p, temperature, uniforms = 9, torch.tensor([0.8]), torch.tensor([[0.1, 0.7, 0.4, 0.9]])
    block, _ = propose(draft, features[0, :p], tokens[0, : p + 1].tolist(), temperature, uniforms)
    drawn = block.tokens[0]
    assert len(set(drawn.tolist())) > 1 and (vocab is None or bool((drawn % 2 == 1).all()))
    followed = tokens[:1].clone()
    followed[0, p + 1 : p + 1 + G] = drawn
    hidden = draft.unroll(features[:1], followed, torch.tensor([[p]]), G)
    torch.testing.assert_close(block.logits, draft.lm_head(hidden[:, 0]), atol=1e-5, rtol=1e-5)


def test_a_batch_of_requests_is_each_alone():
    """Requests of different lengths: what a mask hides (rows that are not there yet) changes nothing."""
    draft = make("eagle3", 2)
    features, tokens = text(draft)
    at, uniforms = torch.tensor([12, 5]), torch.rand(2, G, generator=torch.Generator().manual_seed(3))
    rows = draft.rows(features, tokens.roll(-1, 1), (at - 1)[:, None])
    bias = torch.zeros(2, S).masked_fill(torch.arange(S) >= at[:, None], -torch.inf)
    both = draft.sample_block(rows.hidden[:, 0], at, rows.caches, bias, torch.tensor([0.0, 1.0]), uniforms)
    for r, t in enumerate((0.0, 1.0)):
        p = int(at[r])
        alone, _ = propose(draft, features[r, :p], tokens[r, : p + 1].tolist(), torch.tensor([t]), uniforms[r : r + 1])
        assert torch.equal(both.tokens[r], alone.tokens[0])
        torch.testing.assert_close(both.logits[r], alone.logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_a_block_sees_no_feature_from_its_anchor_on_and_no_later_token(kind):
    draft = make(kind)
    features, tokens = text(draft, B=1)
    p, before = 6, draft.unroll(*text(draft, B=1), torch.tensor([[6]]), G)
    features[:, p:] = 0
    tokens[:, p + 2 :] = 5
    after = draft.unroll(features, tokens, torch.tensor([[p]]), G)
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.allclose(before[:, :, 2], after[:, :, 2])
    features[:, p - 1] = 0
    assert not torch.allclose(before[:, :, 0], draft.unroll(features, tokens, torch.tensor([[p]]), G)[:, :, 0])


def test_asked_rows_are_those_of_all():
    draft = make("mtp", 2)
    features, tokens = text(draft)
    at = torch.tensor([[3, 0], [17, 8]])
    every, some = draft.rows(features, tokens), draft.rows(features, tokens, at)
    picked = torch.stack([every.hidden[b, at[b]] for b in range(2)])
    torch.testing.assert_close(some.hidden, picked, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for x, y in zip(every.caches, some.caches) for a, b in zip(x, y))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": "medusa"}, "kind is 'medusa'; it must be one of eagle3, mtp."),
        ({"target_layer_ids": (0, 3)}, r"\[0, 3\]; an eagle3 draft may not read 3.*-1..2."),
        ({"target_layer_ids": (2, 1)}, "must increase strictly"),
        ({"target_layer_ids": ()}, "target_layer_ids is empty"),
        ({"kind": "mtp"}, "exactly one layer"),
        ({"block_size": 0}, "block_size is 0; it must lie in 1..64."),
        ({"draft_vocab_size": 49}, "draft_vocab_size is 49; it must lie in 1..48."),
    ],
)
def test_what_cannot_be_is_one_sentence(change, words):
    with pytest.raises(ValueError, match=words) as caught:
        replace(make("eagle3").config, **change)
    assert str(caught.value).endswith(".")
