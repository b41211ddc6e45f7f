"""The account of inputs and checkpoint tensors."""

from __future__ import annotations

import pytest

from export.__main__ import build_graphs
from export.account import check_graphs
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft
from training.target import TargetModel


@pytest.fixture()
def built(tmp_path):
    folder = make_target(tmp_path / "target", family="qwen3")
    draft = load_draft(make_draft(tmp_path / "draft", folder, draft_vocab=40))
    target = TargetModel.from_pretrained(folder, draft.config.target_layer_ids)
    graphs = build_graphs(target, draft, dtype="int8", max_context=64)
    check_graphs(graphs, target, draft)
    return {g.name: g for g in graphs}, graphs, target, draft


def test_an_input_without_a_consumer(built):
    by_name, *arguments = built
    by_name["markov"].input("idle", "int64", ("R",))
    with pytest.raises(ValueError, match="graph markov: input idle has no consumer"):
        check_graphs(*arguments)


def test_a_tensor_that_is_missing(built):
    by_name, *arguments = built
    by_name["target"].sources = {k: v for k, v in by_name["target"].sources.items() if "layers.1.mlp.down_proj" not in k}
    with pytest.raises(ValueError, match="graph target: checkpoint tensor layers.1.mlp.down_proj.weight is not in it"):
        check_graphs(*arguments)


def test_a_tensor_in_the_wrong_graph(built):
    by_name, *arguments = built
    by_name["verify"].sources["stray"] = ("fc.weight",)
    with pytest.raises(ValueError, match="graph verify: it holds checkpoint tensor fc.weight"):
        check_graphs(*arguments)
