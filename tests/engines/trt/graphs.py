"""Tiny graphs in TensorRT's form, written where a builder can read them."""

from __future__ import annotations

from pathlib import Path

from engines.specs import TensorSpec
from engines.trt.build import Job
from engines.trt.plans import GraphFile
from engines.trt.profiles import limits_for, profiles_of
from export.__main__ import build_graphs
from export.bundle import file_hash, load_models
from export.graph import Graph
from tests.tiny import make_draft, make_target

MAX_CONTEXT, BLOCK, VOCAB = 128, 4, 64
LIMITS = limits_for(requests=4, chunk=16, block=BLOCK, vocab=VOCAB, max_context=MAX_CONTEXT)
PROFILES = profiles_of(LIMITS)
WORKSPACE = 1 << 30


def tiny_graphs(
    folder: Path, dtype: str, *, family: str = "llama", head_dim: int = 16, depth: int = 2, **draft
) -> dict[str, Graph]:
    """The five graphs of a random target and draft, saved under folder/NAME. Fused attention needs a head_dim of 16 to
    256."""
    target = make_target(folder / "checkpoint", family=family, head_dim=head_dim, layers=depth)
    return graphs_of(target, make_draft(folder / "draft", target, **draft), folder, dtype, LIMITS)


def graphs_of(target: Path, draft: Path, folder: Path, dtype: str, limits) -> dict[str, Graph]:
    """The five graphs of two checkpoints, saved under folder/NAME."""
    models = load_models(target, draft, MAX_CONTEXT)
    graphs = build_graphs(*models[:2], dtype=dtype, max_context=MAX_CONTEXT, static_cache=limits.cache)
    for graph in graphs:
        graph.save(folder / graph.name)
    return {graph.name: graph for graph in graphs}


def specs(graph: Graph) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(s.name, s.dtype, s.shape) for s in graph.inputs)


def job(folder: Path, graph: Graph, *, capability: str = "8.9", profiles=None, inputs=None) -> Job:
    profiles = PROFILES[graph.name] if profiles is None else profiles
    onnx = folder / graph.name / "model.onnx"
    return Job(graph.name, onnx, specs(graph) if inputs is None else inputs, profiles, capability, WORKSPACE, onnx.with_name("model.plan"))


def graph_file(folder: Path, graph: Graph) -> GraphFile:
    path = folder / graph.name / "model.onnx"
    data = path.with_name("model.onnx.data")
    return GraphFile(graph.name, path, file_hash(path), file_hash(data) if data.is_file() else "", specs(graph))
