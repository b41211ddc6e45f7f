"""The markov graph's two branches: the same values as the graph without them, and few nodes where nobody draws."""

from __future__ import annotations

import numpy as np
import pytest

from export.autoregressive import build_steps
from export.graph import every_node
from export.heads import build_markov
from export.idle_draws import lower_idle_draws
from export.lower_onnxruntime import lower
from export.quantize import quantize
from tests.kernels import runner_of
from tests.tiny import make_draft, make_target
from training.checkpoint import load_draft

HEADS = [{}, {"head": "gated"}, {"head": "rnn", "draft_vocab": 40}, {"rank": 0}, {"block_size": 1}]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target") / "t")


def feeds_for(draft, R: int, drawn: list[int], matched: list[int]) -> dict:
    """Of one round; the noise of matched requests is over the target's vocabulary."""
    rng, c = np.random.default_rng(R), draft.config
    G, V, floats = c.block_size, c.decoder.vocab_size, lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    hidden, base = floats(R, G, c.decoder.hidden_size), floats(R, G, c.vocab_out)
    uniforms, noise = (rng.integers(0, 2**23, (len(drawn), G)) / 2**23).astype(np.float32), floats(len(matched), G, V)
    return dict(
        hidden=hidden, base_logits=base, anchor_ids=rng.integers(0, V, R), sample_index=np.array(drawn, np.int64),
        temperature=np.full(len(drawn), 0.7, np.float32), uniforms=uniforms, match_index=np.array(matched, np.int64),
        match_temperature=np.full(len(matched), 1.3, np.float32), noise=noise,
    )  # fmt: skip


@pytest.mark.parametrize("options", HEADS, ids=["vanilla", "gated", "rnn, trimmed", "dflash", "one slot"])
@pytest.mark.parametrize("form", ["fp32", "int8", "native"])
def test_both_branches_give_what_the_whole_graph_gives(tmp_path, monkeypatch, target, options, form):
    draft = load_draft(make_draft(tmp_path / "draft", target, **options))
    runners = []
    for name, last in (("whole", lambda g: None), ("branches", lower_idle_draws)):
        graph = build_markov(draft)
        if form != "fp32":
            quantize(graph, blocks=form == "native")
        monkeypatch.setattr("export.lower_onnxruntime.lower_idle_draws", last)
        lower(graph, native=form == "native")
        assert any(node.op_type == "If" for node in graph.nodes) == (name == "branches")
        whole = form == "native" and name == "branches" and draft.config.markov_head_type == "vanilla" and draft.config.markov_rank
        assert any(node.op_type == "GreedyMarkov" for node in every_node(graph.nodes)) == bool(whole)
        graph.save(tmp_path / name)
        runners.append(runner_of(tmp_path / name, graph))
    for drawn, matched in (([], []), ([0, 2], []), ([], [1]), ([3], [0, 1])):
        for R in (1, 4) if not drawn and not matched else (4,):
            feeds = feeds_for(draft, R, drawn, matched)
            want, got = (run(**feeds) for run in runners)
            assert want.keys() == got.keys()
            for name, value in want.items():
                assert got[name].dtype == value.dtype, name
                np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_the_idle_branch_is_short_and_shares_the_weights(target, tmp_path):
    graph = build_markov(load_draft(make_draft(tmp_path / "draft", target, draft_vocab=40)))
    whole, weights = len(graph.nodes), set(graph.weights)
    lower_idle_draws(graph)
    *condition, switch = graph.nodes
    branches = {a.name: a.g for a in switch.attribute}
    assert [node.op_type for node in graph.nodes] == ["Shape", "Shape", "Add", "Greater", "If"]
    assert len(branches["then_branch"].node) == whole and len(branches["else_branch"].node) < 0.5 * whole
    assert not any(g.initializer for g in branches.values()) and weights <= set(graph.weights)
    read = {name for node in every_node(branches["else_branch"].node) for name in node.input}
    assert not read & {"sample_index", "temperature", "uniforms", "match_index", "match_temperature", "noise"}


def test_steps_over_a_cache_and_other_graphs_are_left_as_they_are(tmp_path, target):
    draft = load_draft(make_draft(tmp_path / "draft", target, kind="eagle3"))
    graph = build_steps(draft, 64)
    names = [node.name for node in graph.nodes]
    lower_idle_draws(graph)
    assert [node.name for node in graph.nodes] == names
