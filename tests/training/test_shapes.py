"""Random checkpoints of published shapes: sizes as published, loadable, the same for the same seed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from training.checkpoint import checkpoint_hash, load_draft
from training.draft import DraftModel
from training.shapes import SHAPES, draft_shape, main, write_random
from training.target import TIED, TargetModel
from training.weights import stored_tensors

SMALL = replace(
    SHAPES["qwen3-0.6b"], vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


def parameters(module, *without: str) -> int:
    return sum(t.numel() for name, t in module.state_dict().items() if name not in without)


@pytest.mark.parametrize("name, millions", [("qwen3-0.6b", 596), ("qwen3-4b", 4022)])
def test_the_shapes_have_their_published_sizes(name, millions):
    with torch.device("meta"):
        assert round(parameters(TargetModel(SHAPES[name]), TIED) / 1e6) == millions


def test_the_draft_has_the_published_shape():
    config = draft_shape(SHAPES["qwen3-4b"])
    assert (config.block_size, config.markov_rank) == (7, 256)
    assert (config.decoder.num_hidden_layers, config.decoder.vocab_size) == (5, 151936)
    assert config.target_layer_ids == (1, 9, 17, 25, 33)
    assert draft_shape(SHAPES["qwen3-0.6b"]).target_layer_ids == (1, 7, 13, 19, 25)
    with torch.device("meta"):
        assert parameters(DraftModel(config)) > 1.3e9


def test_what_is_written_loads_and_repeats(tmp_path):
    written = write_random(SMALL, tmp_path / "target", draft=tmp_path / "draft", shard_bytes=4096)
    again = write_random(SMALL, tmp_path / "again", shard_bytes=4096)
    assert checkpoint_hash(tmp_path / "again") == checkpoint_hash(tmp_path / "target") and again < written
    stored = stored_tensors(tmp_path / "target")
    assert {t.kind for t in stored.values()} == {"BF16"} and len({t.file for t in stored.values()}) > 3
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: t.file.name for name, t in stored.items()}
    target = TargetModel.from_pretrained(tmp_path / "target")
    assert target.config == SMALL and target.lm_head.weight is target.embed_tokens.weight
    assert load_draft(tmp_path / "draft").config.target_layer_ids == (-1, 1)


def test_a_gemma4_loads_and_so_does_its_draft(tmp_path):
    details = replace(SHAPES["gemma4-defaults"].gemma4, global_head_dim=32, per_layer_size=8)
    config = replace(
        SHAPES["gemma4-defaults"], vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=12, head_dim=16,
        num_attention_heads=4, embed_scale=32**0.5, gemma4=replace(details, layer_types=details.layer_types[:12]),
    )  # fmt: skip
    write_random(config, tmp_path / "target", draft=tmp_path / "draft")
    assert TargetModel.from_pretrained(tmp_path / "target").config == config
    draft = load_draft(tmp_path / "draft").config
    assert draft.decoder == config.for_draft(5) and draft.decoder.layer(4).head_dim == 32


def test_what_it_does_not_know_is_one_sentence():
    import typer

    app = typer.Typer()
    app.command()(main)
    refused = {"must be one of gemma4-defaults, qwen3-0.6b, qwen3-4b.": ["--shape", "x"], "2 or more.": ["--shape", "qwen3-4b", "--layers", "1"]}
    for words, options in refused.items():
        done = CliRunner().invoke(app, [*options, "--out", "nowhere"])
        assert done.exit_code == 1 and done.output.strip().endswith(words)
