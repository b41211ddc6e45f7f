"""Every graph of every kind of bundle compiles, for real, with its attention fused. What no test here can do is run a
plan."""

from __future__ import annotations

import pytest

from engines.trt.api import load_api
from engines.trt.build import compile_graph
from engines.trt.profiles import limits_for, profiles_of
from tests.engines.trt.graphs import BLOCK, PROFILES, graphs_of, job, tiny_graphs
from tests.tiny import make_draft, make_target
from training.decoder_config import DecoderConfig, RopeConfig
from training.shapes import write_random

SMOLLM2 = DecoderConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, rope=RopeConfig(theta=1e5), max_position_embeddings=8192,
    qk_norm=False, tie_word_embeddings=True, model_type="llama",
)  # fmt: skip
WIDE = limits_for(requests=4, chunk=16, block=7, vocab=49152, max_context=128)
FAMILIES = {"llama": {"head": "vanilla"}, "qwen3": {"head": "rnn", "draft_vocab": 40}}
HEADS = {
    "gated": {"head": "gated", "confidence": "hidden"},
    "dflash": {"rank": 0, "confidence": None},
    "vanilla trimmed": {"draft_vocab": 40},
}
OTHERS = [(dtype, sm) for dtype in ("fp16", "bf16") for sm in ("8.0", "8.9", "12.0") if (dtype, sm) != ("fp16", "8.9")]
CACHES = {"target": 4, "backbone": 2}  # cache tensors of the tiny models: two a layer


@pytest.fixture(scope="module")
def api():
    return load_api("tensorrt-rtx")


def check(api, folder, graph, capability: str) -> None:
    plan = compile_graph(api, job(folder, graph, capability=capability))
    caches = CACHES.get(graph.name, 0)
    assert plan.size > 100_000 and plan.kernels and plan.seconds > 0
    assert len(plan.attentions) == caches // 2 and plan.unfused == ()
    fused = [kernel for kernel in plan.kernels if kernel.fused_attention]
    assert len(fused) == caches // 2 * len(PROFILES[graph.name])
    assert {node for kernel in fused for node in kernel.nodes} >= set(plan.attentions)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_five_graphs_compile_with_fused_attention(tmp_path, api, family):
    for graph in tiny_graphs(tmp_path, "fp16", family=family, **FAMILIES[family]).values():
        check(api, tmp_path, graph, "8.9")


def test_gemma4_compiles_with_a_window_in_the_graph(tmp_path, api):
    """Sliding and full layers (heads of 16 and 32), values that are keys; the draft has full layers. Those have one
    key-value head here, for which the builder found no fused kernel: it decomposes them, and the export warns."""
    graphs = tiny_graphs(tmp_path, "fp16", family="gemma4-12b")
    for name, attentions in (("target", 2), ("backbone", 1)):
        plan = compile_graph(api, job(tmp_path, graphs[name]))
        assert len(plan.attentions) == attentions and len(plan.unfused) <= 1 and plan.size > 100_000


def test_gemma4s_shared_keys_and_layer_inputs_compile(tmp_path, api):
    graph = tiny_graphs(tmp_path, "bf16", family="gemma4-e", depth=3)["target"]
    plan = compile_graph(api, job(tmp_path, graph))
    assert len(plan.attentions) == 3 and plan.unfused == ()
    assert sum(s.name.startswith("past_key_values.") for s in graph.inputs) == 4


@pytest.mark.parametrize("head", HEADS)
def test_the_other_heads_compile(tmp_path, api, head):
    graphs = tiny_graphs(tmp_path, "fp16", block_size=BLOCK, **HEADS[head])
    for name in ("markov", "confidence", "verify"):
        check(api, tmp_path, graphs[name], "8.9")


@pytest.mark.parametrize("dtype, options", [("fp16", dict(kind="eagle3")), ("bf16", dict(kind="mtp", layers=2))])
def test_a_draft_by_steps_compiles(tmp_path, api, dtype, options):
    """The rows' attention fused; the steps' is products and a softmax, over caches that are only read."""
    limits = limits_for(requests=4, chunk=16, block=BLOCK, vocab=64, max_context=128, autoregressive=True)
    target = make_target(tmp_path / "checkpoint", head_dim=16)
    graphs = graphs_of(target, make_draft(tmp_path / "draft", target, **options), tmp_path, dtype, limits)
    for name, attentions in (("backbone", options.get("layers", 1)), ("markov", 0)):
        plan = compile_graph(api, job(tmp_path, graphs[name], profiles=profiles_of(limits)[name]))
        assert len(plan.attentions) == attentions and plan.unfused == () and plan.size > 100_000


def test_a_block_whose_anchor_drafts_nothing_compiles(tmp_path, api):
    graph = tiny_graphs(tmp_path, "fp16", rank=0, confidence=None, sample_from_anchor=False)["backbone"]
    limits = limits_for(requests=4, chunk=16, block=BLOCK, vocab=64, max_context=128, sample_from_anchor=False)
    plan = compile_graph(api, job(tmp_path, graph, profiles=profiles_of(limits)["backbone"]))
    assert len(plan.attentions) == 1 and plan.unfused == ()


@pytest.mark.parametrize("dtype, capability", [("bf16", "12.0")])
def test_another_precision_and_gpu(tmp_path, api, dtype, capability):
    graphs = tiny_graphs(tmp_path, dtype, family="qwen3", depth=2)
    for name in ("target", "backbone"):
        check(api, tmp_path, graphs[name], capability)


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def smollm2(request, tmp_path_factory):
    """(folder, graphs) of SmolLM2-135M's widths and vocabulary, two of its layers and a draft of the same widths."""
    folder = tmp_path_factory.mktemp(f"smollm2-{request.param}")
    write_random(SMOLLM2, folder / "target", draft=folder / "draft")
    return folder, graphs_of(folder / "target", folder / "draft", folder, request.param, WIDE)


@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.0"])
def test_smollm2s_widths_compile(api, smollm2, capability):
    folder, graphs = smollm2
    assert set(graphs) == {"target", "backbone", "markov", "confidence", "verify"}
    for graph in graphs.values():
        task = job(folder, graph, capability=capability, profiles=profiles_of(WIDE)[graph.name])
        plan = compile_graph(api, task)
        layers = {"target": 2, "backbone": 5}.get(graph.name, 0)
        assert plan.size > 50_000 and len(plan.attentions) == layers and plan.unfused == ()


@pytest.mark.parametrize("dtype, capability", OTHERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_every_precision_gpu_and_head(tmp_path, api, family, head, dtype, capability):
    for graph in tiny_graphs(tmp_path, dtype, family=family, head=head).values():
        check(api, tmp_path, graph, capability)
