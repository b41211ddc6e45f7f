"""Draft checkpoints: what is written is read again; what does not fit is refused in one sentence."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_draft, make_target
from training.checkpoint import checkpoint_hash, load_draft, save_draft
from training.formats.deepspec import config_from_json, config_to_json

ORACLE = Path(__file__).parent.parent / "oracle"
KINDS = {
    "vanilla": {},
    "gated": {"head": "gated"},
    "rnn": {"head": "rnn", "layer_ids": (-1, 1)},
    "dflash": {"rank": 0, "confidence": None},
    "confidence without Markov": {"confidence": "hidden"},
    "trimmed": {"draft_vocab": 24},
}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def folder(target_folder, tmp_path):
    return make_draft(tmp_path / "draft", target_folder, draft_vocab=24)


def same(a, b):
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_kind_survives_save_and_load(kind, family, tmp_path):
    target_folder = make_target(tmp_path / "target", family=family, bias=family == "llama")
    draft = load_draft(make_draft(tmp_path / "a", target_folder, **KINDS[kind]))
    save_draft(draft, tmp_path / "b", max_file_bytes=8000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    same(draft, load_draft(tmp_path / "b"))


def test_the_written_config_has_the_reference_keys_and_values():
    for name in ("dspark_vanilla", "dflash"):
        raw = json.loads((ORACLE / name / "config.json").read_text())
        written = config_to_json(config_from_json(raw))
        assert {k: v for k, v in written.items() if k in raw and raw[k] != v} == {}
        assert not {k for k in raw if k not in written} & {"block_size", "layer_types", "rope_parameters", "vocab_size"}


def test_names_in_the_file_are_those_of_the_reference():
    for name in ("dspark_vanilla", "dflash"):
        assert load_draft(ORACLE / name).state_dict().keys() == load_file(ORACLE / name / "model.safetensors").keys()


def test_a_checkpoint_may_borrow_the_targets_embedding_and_head(target_folder, tmp_path):
    draft = load_draft(make_draft(tmp_path / "a", target_folder))
    weights = load_file(target_folder / "model.safetensors")
    draft.embed_tokens.weight.copy_(weights["model.embed_tokens.weight"])
    draft.lm_head.weight.copy_(weights["lm_head.weight"])
    save_draft(draft, tmp_path / "b", embed_tokens=False)
    state = load_file(tmp_path / "b" / "model.safetensors")
    assert "embed_tokens.weight" not in state
    save_file({k: v for k, v in state.items() if k != "lm_head.weight"}, tmp_path / "b" / "model.safetensors")
    same(draft, load_draft(tmp_path / "b", target_folder))
    with pytest.raises(ValueError, match="embed_tokens.weight; name the target's folder"):
        load_draft(tmp_path / "b")


def test_a_tied_target_lends_its_embedding_as_head(tmp_path):
    target_folder = make_target(tmp_path / "target", tied=True)
    draft = load_draft(make_draft(tmp_path / "a", target_folder))
    state = load_file(tmp_path / "a" / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "lm_head.weight"}, tmp_path / "a" / "model.safetensors")
    loaded = load_draft(tmp_path / "a", target_folder)
    embedding = load_file(target_folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(loaded.lm_head.weight, embedding)
    assert torch.equal(loaded.fc.weight, draft.fc.weight)


def test_bf16_files_are_loaded_as_fp32(folder, tmp_path):
    draft = load_draft(folder)
    save_draft(draft, tmp_path / "b", dtype=torch.bfloat16)
    assert load_file(tmp_path / "b" / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    loaded = load_draft(tmp_path / "b")
    assert loaded.fc.weight.dtype == torch.float32 and torch.equal(loaded.d2t, draft.d2t)
    torch.testing.assert_close(loaded.fc.weight, draft.fc.weight, rtol=2**-8, atol=0)


def test_saving_over_a_split_checkpoint_leaves_no_old_file(folder):
    draft = load_draft(folder)
    save_draft(draft, folder, max_file_bytes=8000)
    save_draft(draft, folder)
    assert [f.name for f in folder.glob("*.safetensors*")] == ["model.safetensors"]


def test_hash_is_over_all_files_in_name_order(folder, tmp_path):
    data = (folder / "model.safetensors").read_bytes()
    assert checkpoint_hash(folder) == hashlib.sha256(data).hexdigest()
    shutil.copytree(folder, tmp_path / "c")
    (tmp_path / "c" / "a.safetensors").write_bytes(b"first")
    assert checkpoint_hash(tmp_path / "c") == hashlib.sha256(b"first" + data).hexdigest()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        checkpoint_hash(tmp_path)


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        raw.pop(key, None)
        if value is not None:
            raw[key] = value
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"block_size": None}, "lacks block_size"),
        ({"block_size": 0}, "block_size is 0; it must lie in 1..64"),
        ({"target_layer_ids": [0, 7]}, r"target_layer_ids is \[0, 7\]; they must increase strictly and lie in -1..2"),
        ({"target_layer_ids": [1, 0]}, "increase strictly"),
        ({"target_layer_ids": []}, "target_layer_ids is empty"),
        ({"markov_head_type": "lstm"}, "markov_head_type is 'lstm'"),
        ({"markov_rank": 0}, "markov_rank is 0"),
        ({"mask_token_id": 64}, "mask_token_id is 64"),
        ({"draft_vocab_size": 65}, "draft_vocab_size is 65"),
        ({"draft_vocab_size": None}, "lm_head.weight"),
        ({"architectures": ["Gemma4DSparkModel"]}, "architectures"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 48}, "does not fit"),
        ({"num_hidden_layers": 2}, "missing layers.1"),
        ({"enable_confidence_head": False}, "unused confidence_head"),
        ({"confidence_head_with_markov": False}, "confidence_head.proj.weight is"),
    ],
)
def test_misfits_are_one_sentence(folder, change, words):
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=words) as caught:
        load_draft(folder)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_trimmed_draft_needs_its_own_head_and_a_sound_map(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({**state, "d2t": state["d2t"].flip(0)}, file)
    with pytest.raises(ValueError, match="d2t must map to increasing target ids"):
        load_draft(folder)
    save_file({k: v for k, v in state.items() if k != "lm_head.weight"}, file)
    with pytest.raises(ValueError, match="must have its own"):
        load_draft(folder)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_draft(tmp_path)
