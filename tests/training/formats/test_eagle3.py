"""The layouts of autoregressive drafts: public EAGLE-3 folders made by hand, our own, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import decoder_config, make_draft, make_target, randomize
from training.autoregressive import ArConfig, ArDraft
from training.checkpoint import load_draft, save_draft
from training.evaluate import propose
from training.formats.layouts import convert, open_draft

V, V_D, LAYERS = 64, 40, 8
IDS = torch.arange(V_D) + torch.arange(V_D) // 2  # 0, 1, 3, 4, 6, ...


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"), vocab=V, layers=LAYERS)


def module(kind="eagle3", depth=1, family="llama", pruned=True, ids=(1, 3, 4)):
    decoder = decoder_config(family, V, depth)
    ids = ids if kind == "eagle3" else (LAYERS - 1,)
    draft = ArDraft(ArConfig(decoder, kind, 7, ids, LAYERS, V_D if pruned else None))
    randomize(draft, 2)
    if pruned:
        draft.d2t.copy_(IDS - torch.arange(V_D))
    return draft


def by_hand(folder, draft, target, **keys):
    """As SafeAILab's and SpecForge's code write it: Llama's keys, midlayer, t2d, no embedding, no block size."""
    c, state = draft.config.decoder, draft.state_dict()
    with torch.no_grad():
        state["embed_tokens.weight"].copy_(load_file(target / "model.safetensors")["model.embed_tokens.weight"])
    theirs = {n.replace("layers.0.", "midlayer."): t.clone() for n, t in state.items() if "embed" not in n}
    theirs["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill(0, IDS, True)
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 1,
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "max_position_embeddings": 512,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "rms_norm_eps": c.rms_norm_eps, "vocab_size": V, "draft_vocab_size": V_D, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "head_dim": c.head_dim, "rope_theta": c.rope.theta,
    }  # fmt: skip
    raw = {k: v for k, v in {**raw, **keys}.items() if v is not None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def drafted(draft):
    g = torch.Generator().manual_seed(4)
    features = torch.randn(6, len(draft.config.target_layer_ids) * draft.config.decoder.hidden_size, generator=g)
    block, _ = propose(draft, features, torch.arange(10, 17).tolist(), torch.zeros(1), torch.zeros(1, 7))
    return block.logits


PUBLIC = {
    "SafeAILab": ({}, (1, 3, 4)),  # 1, n // 2 - 1, n - 4
    "SpecForge": (
        {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 6]}},
        (0, 2, 6),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_folder_is_read_as_it_was_meant(name, target, tmp_path):
    keys, ids = PUBLIC[name]
    draft = module(ids=ids)
    read = load_draft(by_hand(tmp_path / "public", draft, target, **keys), target)
    assert open_draft(tmp_path / "public", target).layout == "eagle3" and read.config == draft.config
    assert torch.equal(read.draft_to_target(), IDS)
    torch.testing.assert_close(drafted(read), drafted(draft), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind, depth, family", [("eagle3", 1, "llama"), ("eagle3", 2, "qwen3"), ("mtp", 2, "qwen3")])
@pytest.mark.parametrize("pruned", [True, False])
def test_what_is_saved_loads_and_converts_to_the_same(kind, depth, family, pruned, target, tmp_path):
    draft = module(kind, depth, family, pruned)
    save_draft(draft, tmp_path / "ours")
    notes = convert(tmp_path / "ours", tmp_path / "again", kind, target=target)
    said = " ".join(notes)
    assert ("layers behind the first" in said, "norms of queries and keys" in said) == (
        kind == "eagle3" and depth > 1,
        kind == "eagle3" and family == "qwen3",
    )
    for folder in ("ours", "again"):
        read = load_draft(tmp_path / folder)
        assert read.config == draft.config
        assert all(torch.equal(t, read.state_dict()[name]) for name, t in draft.state_dict().items())
        torch.testing.assert_close(drafted(read), drafted(draft), atol=1e-5, rtol=0)
        names = set(load_file(tmp_path / folder / "model.safetensors"))
        assert ("t2d" in names) == (pruned and kind == "eagle3") and ("d2t" in names) == pruned
        assert any(n.startswith("midlayer.") for n in names) == (kind == "eagle3")
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == load_file(
        tmp_path / "again" / "model.safetensors"
    ).keys()


REFUSED = [
    ({"fc_norm": True}, "fc_norm is True; only EAGLE-3 with fc_norm False is supported"),
    ({"norm_output": False}, "norm_output is False; only EAGLE-3 with norm_output True"),
    ({"target_hidden_size": 64}, "target_hidden_size is 64"),
    ({"draft_vocab_size": None}, "lacks draft_vocab_size"),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}}, "may not read 7.*-1..6"),
    ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
]


@pytest.mark.parametrize("keys, words", REFUSED)
def test_what_computes_something_else_is_one_sentence(keys, words, target, tmp_path):
    folder = by_hand(tmp_path / "f", module(), target, **keys)
    with pytest.raises(ValueError, match=words) as caught:
        open_draft(folder, target)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_draft_keeps_its_kind(target, tmp_path):
    save_draft(module(), tmp_path / "eagle")
    with pytest.raises(ValueError, match="a draft of kind 'eagle3' cannot be written in the layout 'deepspec'"):
        convert(tmp_path / "eagle", tmp_path / "x", "deepspec")
    make_draft(tmp_path / "parallel", target)
    with pytest.raises(ValueError, match="'parallel' cannot be written in the layout 'eagle3'; it must be deepspec"):
        convert(tmp_path / "parallel", tmp_path / "x", "eagle3")


def test_without_a_target_its_layers_are_asked_for_and_older_eagles_refused(target, tmp_path):
    folder = by_hand(tmp_path / "f", module(), target)
    with pytest.raises(ValueError, match="does not say how many layers its target has; name the target's folder"):
        open_draft(folder)
    state = load_file(folder / "model.safetensors")
    save_file({"layers.0.fc.weight": state["fc.weight"]}, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text()) | {"architectures": ["EagleLlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="of an older version; this version reads EAGLE-3"):
        open_draft(folder, target)
