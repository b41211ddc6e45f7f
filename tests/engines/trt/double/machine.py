"""A machine with the double for a GPU, and bundles whose plans run on it: engines.load works on both unchanged."""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cuda.bindings
import pytest

from engines.trt.api import MODULES, Api
from engines.trt.plans import Compiler, plan_path
from engines.trt.profiles import limits_for, profiles_of
from export.__main__ import draft_graphs
from export.bundle import draft_entry, engine_entry, load_models, target_entry, write_manifest
from export.heads import build_confidence
from export.precision import HALF, to_half
from export.target import build_target
from export.verify import build_verify

from .cudart import Cudart
from .gpu import Gpu
from .tensorrt import VERSION, Module, plan_bytes


def double_bundle(
    folder: Path, out: Path, *, backend: str = "tensorrt", dtype: str = "fp32", requests: int = 16, chunk: int = 512,
    capability: str = "8.9",
) -> Path:  # fmt: skip
    """The bundle `out` of folder/target and folder/draft in TensorRT's form (dtype "fp32": as it is before the
    half-precision pass), with plans for the double."""
    target, draft, S = load_models(folder / "target", folder / "draft", None)
    G, V = draft.config.block_size, target.config.vocab_size
    limits = limits_for(
        requests=requests, chunk=chunk, block=G, vocab=V, max_context=S,
        sample_from_anchor=draft.config.sample_from_anchor, autoregressive=draft.config.kind != "parallel",
    )  # fmt: skip
    graphs = [
        build_target(target, S, static_cache=limits.cache),
        *draft_graphs(draft, S, static_cache=limits.cache),
        build_confidence(draft),
        build_verify(G, V, draft.draft_to_target().numpy()),
    ]
    engines = {}
    for graph in graphs:
        if dtype in HALF:
            to_half(graph, dtype)
        graph.save(out / "onnx" / graph.name)
        entry = engines[graph.name] = engine_entry(graph, out)
        data = plan_bytes(entry, out, [p.as_json() for p in profiles_of(limits)[graph.name]])
        file = plan_path(graph.name, capability)
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_bytes(data)
        entry["plans"] = {capability: {"path": str(file), "sha256": hashlib.sha256(data).hexdigest()}}
    settings = Compiler(Api(backend, None, VERSION), limits, 1 << 30).settings()
    entries = target_entry(folder / "target", target.config), draft_entry(folder / "draft", draft.config)
    named = dtype if dtype in HALF else "fp16"
    write_manifest(out, engines, *entries, backend=backend, dtype=named, max_context=S, parity=[], tensorrt=settings)
    return out


@contextmanager
def machine(backend: str = "tensorrt", **gpu) -> Iterator[Gpu]:
    """A Gpu that `import tensorrt` (or tensorrt_rtx) and cuda.bindings.runtime lead to meanwhile. At the end it must
    have no problem, and everything must have been given back."""
    double = Gpu(**gpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, MODULES[backend], Module(double))
        patch.setattr(cuda.bindings, "runtime", Cudart(double))
        yield double
    gc.collect()
    assert not double.problems, double.problems
    assert not double.leaks(), double.leaks()
