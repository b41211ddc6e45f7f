"""Every layout: recognised from its files, read as what its trainer meant, written so that nothing is lost.

The folders here are written by hand from the public definitions that each layout's docstring names, not by our writers.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft
from training.draft import DraftModel
from training.formats.decoder import decoder_to_json
from training.formats.layouts import LAYOUTS, convert, kind_of, open_draft
from training.formats.speculators import QWEN3_DEFAULTS

PARALLEL = [name for name in LAYOUTS if kind_of(name) == "parallel"]
QWEN = {"hidden_act": "silu", "initializer_range": 0.02, "attention_dropout": 0.0, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"), family="qwen3", layers=4)


@pytest.fixture
def make(target, tmp_path):
    """make(name, **options of make_draft) -> a DeepSpec folder; bf16 weights, as trainers save them."""

    def made(name="source", **options):
        folder = make_draft(tmp_path / name, target, **options)
        state = load_file(folder / "model.safetensors")
        state = {n: t if t.dtype == torch.int64 else t.bfloat16() for n, t in state.items()}
        save_file(state, folder / "model.safetensors")
        return folder

    return made


def by_hand(folder, source, target, change):
    """A folder whose config.json and weights `change(flat decoder keys, config, tensors)` makes of a DeepSpec one."""
    config = open_draft(source).config
    raw, tensors = change(
        {**QWEN, **decoder_to_json(config.decoder, nested_rope=False)}, config, load_file(source / "model.safetensors")
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


def without(tensors, *names):
    return {n: t for n, t in tensors.items() if n not in names}


def as_specforge(flat, c, tensors):
    """configs/qwen3-4b-dspark.json of SpecForge; its draft module holds neither embedding nor lm_head."""
    method = {
        "attention_mode": "gqa", "mask_token_id": c.mask_token_id, "target_layer_ids": list(c.target_layer_ids),
        "projector_type": "dspark", "markov_rank": c.markov_rank, "markov_head_type": c.markov_head_type,
        "confidence_head_alpha": 1.0, "enable_confidence_head": True, "confidence_head_with_markov": True,
    }  # fmt: skip
    raw = {"architectures": ["DSparkDraftModel"], "auto_map": {"AutoModel": "dspark.DSparkDraftModel"}, **flat}
    raw |= {"block_size": c.block_size, "dflash_config": method, "num_target_layers": c.num_target_layers}
    return raw, without(tensors, "embed_tokens.weight", "lm_head.weight")


def as_modelopt(flat, c, tensors):
    """DSparkExporter of ModelOpt."""
    method = {
        "mask_token_id": c.mask_token_id, "target_layer_ids": list(c.target_layer_ids), "projector_type": "dspark",
        "shift_label": True, "markov_rank": c.markov_rank, "markov_head_type": c.markov_head_type,
        "use_confidence_head": True,
    }  # fmt: skip
    raw = {"architectures": ["DFlashDraftModel"], "block_size": c.block_size, "dflash_config": method, **flat}
    raw |= {"num_target_layers": c.num_target_layers, "torch_dtype": "bfloat16"}
    heads = lambda n: n.removeprefix("markov_head.").replace("confidence_head.proj.", "confidence_proj.")
    return raw, {heads(n): t for n, t in without(tensors, "embed_tokens.weight", "lm_head.weight").items()}


def as_zlab(flat, c, tensors):
    """configs/qwen3-4b-dflash.json: the block's first slot is the anchor's, and drafts nothing."""
    method = {"mask_token_id": c.mask_token_id, "target_layer_ids": list(c.target_layer_ids)}
    raw = {"architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, **flat}
    raw |= {"block_size": c.block_size + 1, "dflash_config": method, "num_target_layers": c.num_target_layers}
    return raw, without(tensors, "embed_tokens.weight", "lm_head.weight")


def as_speculators(flat, c, tensors):
    """DSparkSpeculatorConfig; the nested decoder leaves out what is transformers' default."""
    nested = {
        k: v for k, v in flat.items() if k not in ("rope_theta", "rope_scaling") and QWEN3_DEFAULTS.get(k, "") != v
    }
    nested["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    raw = {
        "architectures": ["DSparkDraftModel"], "speculators_model_type": "dspark", "speculators_version": "0.6.0",
        "aux_hidden_state_layer_ids": [i + 1 for i in c.target_layer_ids], "block_size": c.block_size,
        "draft_vocab_size": c.vocab_out, "mask_token_id": c.mask_token_id, "sample_from_anchor": True,
        "markov_rank": c.markov_rank, "markov_head_type": c.markov_head_type, "enable_confidence_head": True,
        "confidence_head_with_markov": True, "transformer_layer_config": nested, "target_hidden_size": None,
        "speculators_config": {"algorithm": "dspark", "verifier": {"name_or_path": "a/b", "architectures": []}},
    }  # fmt: skip
    if "d2t" in tensors:
        tensors["t2d"] = torch.zeros(c.decoder.vocab_size, dtype=torch.bool)
        tensors["t2d"][torch.arange(c.vocab_out) + tensors["d2t"]] = True
    return raw, tensors


PUBLIC = {"specforge": as_specforge, "modelopt": as_modelopt, "speculators": as_speculators}


def weights(folder, names=None):
    state = load_file(folder / "model.safetensors")
    return {
        n: (t.dtype, t.view(torch.int16).tolist() if t.dtype == torch.bfloat16 else t.tolist())
        for n, t in state.items()
    }


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("layout", PUBLIC)
def test_a_public_folder_is_recognised_and_loads_as_the_same_draft(layout, head, make, target, tmp_path):
    source = make(head=head, layer_ids=(-1, 2))
    folder = by_hand(tmp_path / layout, source, target, PUBLIC[layout])
    opened = open_draft(folder, target)
    assert opened.layout == layout
    assert opened.config == open_draft(source).config
    ours, theirs = load_draft(source).state_dict(), load_draft(folder, target).state_dict()
    own = load_draft(target_like(source, target, tmp_path)).state_dict() if layout != "speculators" else ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[n], own[n]) for n in theirs)


def target_like(source, target, tmp_path):
    """The source with the target's embedding and lm_head."""
    lent, state = load_file(target / "model.safetensors"), load_file(source / "model.safetensors")
    state |= {"embed_tokens.weight": lent["model.embed_tokens.weight"], "lm_head.weight": lent["lm_head.weight"]}
    folder = tmp_path / "lent"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("to", [name for name in PARALLEL if name != "deepspec"])
@pytest.mark.parametrize(
    "options", [{}, {"head": "gated"}, {"head": "rnn"}, {"layers": 2}, {"rank": 0, "confidence": None}], ids=str
)
def test_there_and_back_is_bit_exact(to, options, make, target, tmp_path):
    source = make(**options)
    convert(source, tmp_path / "there", to)
    assert open_draft(tmp_path / "there").layout == to
    convert(tmp_path / "there", tmp_path / "back", "deepspec")
    assert weights(source) == weights(tmp_path / "back")
    assert json.loads((source / "config.json").read_text()) == json.loads(
        (tmp_path / "back" / "config.json").read_text()
    )


@pytest.mark.parametrize("layout", PUBLIC)
@pytest.mark.parametrize("via", PARALLEL)
def test_a_public_folder_survives_every_other_layout(layout, via, make, target, tmp_path):
    folder = by_hand(tmp_path / "public", make(), target, PUBLIC[layout])
    lends = target if via == "speculators" else None  # which stores an lm_head
    convert(folder, tmp_path / "there", via, target=lends or target if layout == "speculators" else lends)
    convert(tmp_path / "there", tmp_path / "back", layout, target=target)
    assert open_draft(tmp_path / "back", target).config == open_draft(folder, target).config
    before, after = weights(folder), weights(tmp_path / "back")
    assert {n: t for n, t in after.items() if n in before} == before
    raw, again = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    method = "speculators" if layout == "speculators" else "dflash_config"
    kept = {k for k in raw if k in again} - {"speculators_config", "transformer_layer_config", "auto_map"}
    assert {k: raw[k] for k in kept} == {k: again[k] for k in kept} and (method == "speculators" or method in kept)


def test_a_pruned_vocabulary_goes_to_speculators_with_both_maps(make, target, tmp_path):
    source = make(draft_vocab=24)
    convert(source, tmp_path / "there", "speculators")
    by_the_book = by_hand(tmp_path / "public", source, target, as_speculators)
    assert weights(tmp_path / "there") == weights(by_the_book)
    convert(by_the_book, tmp_path / "back", "deepspec", target=target)
    assert weights(tmp_path / "back") == weights(source)
    for layout in ("specforge", "modelopt"):
        with pytest.raises(ValueError, match=f"the {layout} layout has no draft vocabulary"):
            convert(source, tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()


def test_dflash_without_a_draft_from_the_anchor(make, target, tmp_path):
    """z-lab's layout: block_size slots, one fewer tokens, every mask predicts its own position."""
    source = make(rank=0, confidence=None)
    folder = by_hand(tmp_path / "zlab", source, target, as_zlab)
    opened = open_draft(folder)
    assert (opened.layout, opened.config.sample_from_anchor) == ("modelopt", False)
    assert (opened.config.block_size, opened.config.block_slots) == (4, 5)
    draft = load_draft(folder, target)
    features, anchors, at = torch.randn(1, 9, 64), torch.tensor([[5, 6]]), torch.tensor([[4, 8]])
    hidden = draft.backbone(features, anchors, at)
    assert hidden.shape == (1, 2, 4, 32)
    wide = DraftModel(opened.config.__class__(**{**vars(opened.config), "block_size": 5, "sample_from_anchor": True}))
    wide.load_state_dict(draft.state_dict())
    assert torch.equal(hidden, wide.backbone(features, anchors, at)[:, :, 1:])
    for to in PARALLEL:
        convert(folder, tmp_path / to, to, target=target)
        assert open_draft(tmp_path / to, target).config == opened.config
        assert open_draft(tmp_path / to, target).layout == to


def test_what_the_layout_borrows_is_left_out_or_kept_with_a_word(make, target, tmp_path):
    lent = target_like(make(), target, tmp_path)
    notes = convert(lent, tmp_path / "a", "specforge", target=target)
    assert "embed_tokens.weight is left out" in " ".join(notes) and "lm_head.weight is left out" in " ".join(notes)
    assert {"embed_tokens.weight", "lm_head.weight"}.isdisjoint(weights(tmp_path / "a"))
    notes = convert(make("own"), tmp_path / "b", "modelopt", target=target)
    assert "lm_head.weight is kept, and modelopt's own loader takes the target's" in " ".join(notes)
    with pytest.raises(ValueError, match="stores an lm_head and the draft has none"):
        convert(tmp_path / "a", tmp_path / "c", "speculators")


def test_files_of_early_and_of_normalised_exports(make, target, tmp_path):
    """SpecForge's logit_head. prefix; its gate script's flat copies under a serving architecture."""
    folder = by_hand(tmp_path / "f", make(), target, as_specforge)
    raw, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    before = open_draft(folder).config
    save_file({("logit_head." + n if "_head." in n else n): t for n, t in state.items()}, folder / "model.safetensors")
    method = raw["dflash_config"]
    raw |= {
        k: method.pop(k)
        for k in ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
    }
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["Qwen3DSparkModel"]}))
    assert open_draft(folder).config == before and open_draft(folder).layout == "specforge"
    load_draft(folder, target)


def test_a_llama_draft_goes_out_with_a_warning(tmp_path):
    source = make_draft(tmp_path / "a", make_target(tmp_path / "t", family="llama"))
    assert "norms of queries and keys" in " ".join(convert(source, tmp_path / "b", "specforge"))
    assert open_draft(tmp_path / "b").config == open_draft(source).config


def test_the_defaults_that_speculators_leaves_out_are_transformers():
    from transformers import Qwen3Config

    theirs = Qwen3Config().to_dict()
    assert {k: theirs[k] for k in QWEN3_DEFAULTS} == QWEN3_DEFAULTS


def test_the_layers_of_the_target_come_from_its_folder(make, target, tmp_path):
    folder = by_hand(tmp_path / "s", make(), target, as_speculators)
    assert open_draft(folder, target).config.num_target_layers == 4
    with pytest.raises(ValueError, match="does not say how many layers its target has; name the target's folder"):
        open_draft(folder)


REFUSED = [
    (as_specforge, {"dflash_config.projector_type": "domino"}, "projector_type is 'domino'"),
    (as_specforge, {"dflash_config.mask_token_id": None}, "lacks mask_token_id"),
    (as_specforge, {"block_size": None}, "lacks block_size"),
    (as_specforge, {"layer_types": ["sliding_attention"]}, "sliding_attention"),
    (as_specforge, {"dflash_config.target_layer_ids": [2, 1]}, "must increase strictly"),
    (as_specforge, {"quantization_config": {"bits": 4}}, "quantised"),
    (as_zlab, {"dflash_config.use_swa": True}, "use_swa is true"),
    (as_zlab, {"block_size": 1}, "block_size is 1; without a draft from the anchor's slot it must be 2 or more"),
    (as_modelopt, {"dflash_config.markov_rank": None}, "lacks markov_rank"),
    (as_speculators, {"speculators_model_type": "mtp"}, "speculators_model_type is 'mtp'"),
    (as_speculators, {"speculators_model_type": "eagle3"}, "an EAGLE-3 draft in the speculators layout"),
    (as_speculators, {"aux_hidden_state_layer_ids": [2, 5]}, r"target_layer_ids is \[1, 4\]; they must .* -1..3"),
    (as_speculators, {"target_hidden_size": 64}, "target_hidden_size is 64"),
    (as_speculators, {"transformer_layer_config": None}, "no draft of a known layout|lacks transformer_layer_config"),
    (as_speculators, {"block_size": "seven"}, "seven"),
]


@pytest.mark.parametrize("hand, change, words", REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_read_is_one_sentence(hand, change, words, make, target, tmp_path):
    folder = by_hand(tmp_path / "f", make(rank=0, confidence=None) if hand is as_zlab else make(), target, hand)
    raw = json.loads((folder / "config.json").read_text())
    for path, value in change.items():
        *outer, key = path.split(".")
        inner = raw[outer[0]] if outer else raw
        inner.pop(key, None)
        if value is not None:
            inner[key] = value
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=words) as caught:
        open_draft(folder, target)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_other_folders_are_refused(make, target, tmp_path):
    with pytest.raises(ValueError, match="no draft of a known layout"):
        open_draft(target)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{nonsense")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        open_draft(tmp_path / "x")
    with pytest.raises(ValueError, match="the layout is 'gguf'; it must be one of"):
        convert(make(), tmp_path / "y", "gguf")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(make("again"), target, "deepspec")
