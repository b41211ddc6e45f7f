"""The parity check itself must be able to fail: each engine's graph is damaged once and must be caught."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from export.__main__ import build_graphs
from export.parity import check_parity, real_tokens
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft
from training.target import TargetModel


def models(tmp_path, **options):
    folder = make_target(tmp_path / "target")
    draft = load_draft(make_draft(tmp_path / "draft", folder, draft_vocab=40, **options))
    return folder, TargetModel.from_pretrained(folder, draft.config.target_layer_ids), draft


def scale(name: str, factor: float):
    return lambda g: g.weights.__setitem__(name, g.weights[name] * np.float32(factor))


def roll(name: str):
    return lambda g: g.weights.__setitem__(name, np.roll(g.weights[name], 1))


DAMAGE = {
    "target": scale("layers.2.mlp.down_proj.T", 1.01),
    "backbone": scale("hidden_norm.weight", 0.98),
    "markov": roll("draft_to_target"),
    "confidence": scale("confidence_head.proj.T", -1),
    "verify": roll("draft_to_target"),
}


@pytest.mark.parametrize("engine", DAMAGE)
def test_a_damaged_graph_is_caught(tmp_path, engine):
    folder, target, draft = models(tmp_path)
    graphs = build_graphs(target, draft, dtype="fp32", max_context=128)
    DAMAGE[engine](next(g for g in graphs if g.name == engine))
    for g in graphs:
        g.save(tmp_path / "bundle" / "onnx" / g.name)
    with pytest.raises(ValueError, match=f"^parity: {engine}, "):
        check_parity(tmp_path / "bundle", graphs, target, draft, folder, dtype="fp32", console=Console(quiet=True))


STEPS_DAMAGE = {  # of a draft of two layers: (engine, damage)
    "rows": ("backbone", scale("layers.1.self_attn.q_proj.T", 1.05)),
    "steps": ("markov", scale("layers.1.self_attn.o_proj.T", 1.05)),
    "map": ("markov", roll("draft_to_target")),
    "entrance": ("markov", scale("layers.0.hidden_norm.weight", 0.9)),
}


@pytest.mark.parametrize("what", STEPS_DAMAGE)
def test_a_damaged_graph_of_an_autoregressive_draft_is_caught(tmp_path, what):
    folder, target, draft = models(tmp_path, kind="eagle3", layers=2)
    graphs = build_graphs(target, draft, dtype="fp32", max_context=128)
    engine, damage = STEPS_DAMAGE[what]
    damage(next(g for g in graphs if g.name == engine))
    for g in graphs:
        g.save(tmp_path / "bundle" / "onnx" / g.name)
    with pytest.raises(ValueError, match=f"^parity: {engine}, "):
        check_parity(tmp_path / "bundle", graphs, target, draft, folder, dtype="fp32", console=Console(quiet=True))


def test_real_tokens_without_a_tokenizer_are_the_targets_own(tmp_path):
    folder, target, _ = models(tmp_path)
    tokens = real_tokens(target, folder)
    assert [len(t) for t in tokens] == [27, 17, 34] and all(0 <= i < 64 for t in tokens for i in t)
