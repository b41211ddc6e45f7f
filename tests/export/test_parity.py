"""The parity check itself must be able to fail: each engine's graph is damaged once and must be caught."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.console import Console

from export.__main__ import build_graphs
from export.parity import Parity, check_parity, real_tokens
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft
from training.target import PackedBatch, TargetModel


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


@pytest.mark.parametrize(
    "dtype, options, normed",
    [
        ("int8", dict(kind="mtp", layer_ids=(2,)), True),
        ("int8", dict(kind="mtp", layer_ids=(1,)), False),
        ("int8", dict(kind="eagle3", layer_ids=(1,)), False),
        ("int8-block64", dict(kind="mtp", layer_ids=(2,)), False),
        ("fp32", dict(kind="mtp", layer_ids=(2,)), False),
    ],
)
def test_only_the_last_layer_for_an_int8_mtp_draft_is_normed_first(tmp_path, dtype, options, normed):
    """A feature that is too large by a factor is no error to one that norms it; one out of order is."""
    folder, target, draft = models(tmp_path, **options)
    parity = Parity(tmp_path, [], target, draft, dtype)
    assert parity.normed == normed
    for damage, ok in ((lambda x: 1.3 * x, normed), (lambda x: np.roll(x, 1, axis=-1), False)):
        parity.run["target"] = Damaged(target, damage)
        parity.target_pass("case", [[1, 2, 3], [4, 5], [6]], [0, 0, 0], target.new_caches(3, parity.C))
        assert parity.checks[-1].ok == ok and ("normed" in parity.checks[-1].case) == normed


class Damaged:
    """A target engine that is PyTorch's, with its features changed."""

    def __init__(self, target, damage):
        self.target, self.damage = target, damage

    def __call__(self, logit_rows, mask, **fields):
        fields = {name: torch.from_numpy(x) for name, x in fields.items()}
        batch = PackedBatch(**fields, mask=torch.from_numpy(mask == 0))
        out = self.target(batch, torch.from_numpy(logit_rows), self.target.new_caches(3, mask.shape[-1]))
        return {"logits": out.logits.detach().numpy(), "features": self.damage(out.features.detach().numpy())}


def test_real_tokens_without_a_tokenizer_are_the_targets_own(tmp_path):
    folder, target, _ = models(tmp_path)
    tokens = real_tokens(target, folder)
    assert [len(t) for t in tokens] == [27, 17, 34] and all(0 <= i < 64 for t in tokens for i in t)
