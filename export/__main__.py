"""python -m export: a target and a draft checkpoint -> a checked bundle of five engines.

Knows: the order of the steps and what the user sees of them. Refuses to know: any step's inside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from rich.console import Console

from engines.bundle import DTYPES, TENSORRT_DTYPES
from engines.trt.api import default_backend
from engines.trt.memory import PeakMemory

from .account import check_graphs
from .autoregressive import build_rows, build_steps
from .backbone import build_backbone
from .bundle import (
    copy_tokenizer,
    draft_entry,
    engine_entry,
    file_hash,
    kept_calibration,
    load_models,
    open_sources,
    target_entry,
    write_manifest,
    written_whole,
)
from .compile import Planner, PlanOptions
from .graph import Graph
from .heads import build_confidence, build_markov
from .kernels import LIBRARY, KernelsError, library
from .lower_onnxruntime import lower
from .packed_slots import ATTENTION
from .parity import check_parity
from .precision import HALF, emulated, to_half
from .quantize import quantize
from .target import build_target
from .verify import build_verify
from .weight_only import weights_only

AUTO = "auto"
Backend = Enum("Backend", {name: name for name in (*DTYPES, AUTO)}, type=str)
Dtype = Enum("Dtype", {name: name for name in ("fp32", "int8", "int8-block64", "fp16", "bf16")}, type=str)
Kernels = Enum("Kernels", {name: name for name in (AUTO, "native", "onnxruntime")}, type=str)
Emulated = Enum("Emulated", {name: name for name in TENSORRT_DTYPES}, type=str)


def build_graphs(
    target, draft, *, dtype: str, max_context: int, static_cache: int | None = None, native: bool = False
) -> list[Graph]:
    """The five graphs in the order of the round. target, draft: models, or sources (sources.py), whose weights are read
    as the graphs are saved. dtype: a key of HALF for TensorRT's form (static_cache: its caches' fixed length), one of
    DTYPES for ONNX Runtime's. native: int8 by the operators of engines/kernels."""
    graphs = [
        build_target(target, max_context, static_cache=static_cache, native=native),
        *draft_graphs(draft, max_context, static_cache=static_cache, native=native),
        build_confidence(draft),
        build_verify(draft.config.block_size, target.config.vocab_size, draft.draft_to_target().numpy()),
    ]
    for graph in graphs:
        if dtype in HALF:
            if dtype == "w8a16":
                weights_only(graph)
            to_half(graph, dtype)
            continue
        if dtype != "fp32":
            quantize(graph, blocks=native or dtype == "int8-block64" and graph.name == "target")
        lower(graph, native=native)
    return graphs


def draft_graphs(draft, max_context: int, *, static_cache: int | None = None, native: bool = False) -> list[Graph]:
    """backbone and markov of either kind of draft."""
    if draft.config.kind == "parallel":
        return [build_backbone(draft, max_context, static_cache=static_cache, native=native), build_markov(draft)]
    return [build(draft, max_context, static_cache=static_cache) for build in (build_rows, build_steps)]


def export(
    target: Path, draft: Path, out: Path, *, backend: str = "onnxruntime", dtype: str | None = None,
    max_context: int | None = None, options: PlanOptions = PlanOptions(), parity: bool = True,
    emulate: str | None = None, kernels: str = AUTO, console: Console | None = None,
) -> None:  # fmt: skip
    """Writes the bundle `out` and checks it. backend "auto": TensorRT where it loads, else TensorRT-RTX; dtype None:
    the backend's first (DTYPES); options: for a TensorRT only. parity: compare with PyTorch, which takes both models in
    float32 and more; without it, weights pass through memory one by one. emulate: a TensorRT dtype; the bundle is then
    one for ONNX Runtime in fp32 whose graphs round as that dtype's do. kernels: whose operators a CPU takes, "native"
    (engines/kernels, compiled now; fp32: attention alone), "onnxruntime", or "auto": int8 native where they compile.

    Raises ValueError or FileNotFoundError with one sentence."""
    backend = default_backend() if backend == AUTO else backend
    console, dtype = console or Console(stderr=True), dtype or DTYPES[backend][0]
    if dtype not in (dtypes := DTYPES[backend]):
        raise ValueError(f"dtype is {dtype!r}; for the backend {backend} it must be one of {', '.join(dtypes)}.")
    if emulate and (backend, dtype) != ("onnxruntime", "fp32"):
        raise ValueError(f"emulate is {emulate!r}; it needs backend onnxruntime and dtype fp32, not {backend} {dtype}.")
    planner = None if backend == "onnxruntime" else Planner.of(backend, options)  # refuses before anything is read
    compiled = kernels_for(kernels, backend, dtype, console)
    precision = emulate or dtype
    precision = "w8a16" if precision == "int8" and (planner or emulate) else precision
    with written_whole(out) as partial:
        with PeakMemory() as memory:
            with console.status("reading checkpoints"):
                *sources, max_context = open_sources(target, draft, max_context)
            limits = planner and planner.limits(*sources, max_context)
            cache = limits.cache if limits else None
            graphs = build_graphs(*sources, dtype=precision, max_context=max_context, static_cache=cache, native=bool(compiled))
            if compiled:
                (partial / LIBRARY).write_bytes(compiled)
            check_graphs(graphs, *sources)
            if emulate:
                graphs = [emulated(graph, precision) for graph in graphs]
            for graph in graphs:
                with console.status(f"writing {graph.name}"):
                    graph.save(partial / "onnx" / graph.name)
        console.print(f"graphs written: {said(memory, target, draft)}")
        copy_tokenizer(target, partial)
        checks = []
        if parity:
            forms = runnable(partial, graphs, precision, emulate)
            with console.status("checking parity with PyTorch"), forms as (folder, runnables):
                models = load_models(target, draft, max_context)[:2]
                checks = check_parity(folder, runnables, *models, target, dtype=precision, console=console)
        else:
            console.print("parity: skipped; no graph was compared with PyTorch, no output was looked at")
        with console.status("hashing"):
            entries = target_entry(target, sources[0].config), draft_entry(draft, sources[1].config)
            engines = {graph.name: engine_entry(graph, partial) for graph in graphs}
        settings = planner and planner.compile(partial, graphs, engines, limits, previous=out, console=console)
        write_manifest(
            partial, engines, *entries, backend=backend, dtype=dtype, max_context=max_context, parity=checks,
            calibration=kept_calibration(out, *entries), tensorrt=settings, emulates=emulate,
            kernels=kernels_entry(partial, graphs) if compiled else None,
        )
    console.print(f"wrote {out}")


def kernels_entry(bundle: Path, graphs: list[Graph]) -> dict:
    """The manifest's `kernels`."""
    attention = [g.name for g in graphs if any(node.op_type in ATTENTION for node in g.nodes)]
    return {"path": LIBRARY, "sha256": file_hash(bundle / LIBRARY), "attention": attention}


def kernels_for(kernels: str, backend: str, dtype: str, console: Console) -> bytes | None:
    """The compiled operators, or None for ONNX Runtime's own. Raises ValueError, one sentence, where "native" cannot be had."""
    if kernels == "native" and (backend != "onnxruntime" or dtype not in ("int8", "fp32")):
        raise ValueError(f"kernels is 'native'; they are of the backend onnxruntime and dtype int8 or fp32, not {backend} {dtype}.")
    if kernels != "native" and (kernels == "onnxruntime" or (backend, dtype) != ("onnxruntime", "int8")):
        return None  # fp32 bundles are for GPUs too, which the kernels are not
    try:
        with console.status("compiling the CPU kernels"):
            return library()
    except KernelsError as error:
        if kernels == "native":
            raise
        slower = "The bundle takes ONNX Runtime's own operators, which are about half as fast."
        console.print(f"kernels: {error} {slower}", highlight=False)
        return None


def said(memory: PeakMemory, *checkpoints: Path) -> str:
    """How much memory was taken, beside the size of the folders' weights."""
    stored = sum(file.stat().st_size for folder in checkpoints for file in folder.glob("*.safetensors"))
    return f"{(memory.start + memory.peak) / 1e6:.0f} MB of memory at most, for checkpoints of {stored / 1e6:.0f} MB"


@contextmanager
def runnable(
    partial: Path, graphs: list[Graph], dtype: str, emulate: str | None = None
) -> Iterator[tuple[Path, list[Graph]]]:
    """(folder, graphs) for ONNX Runtime's CPU provider: the bundle's own, or a float32 emulation of half-precision ones
    (`emulate`: they are one)."""
    if dtype not in HALF or emulate:
        yield partial, graphs
        return
    with TemporaryDirectory(dir=partial) as folder:
        emulations = [emulated(graph, dtype) for graph in graphs]
        for graph in emulations:
            graph.save(Path(folder) / "onnx" / graph.name)
        yield Path(folder), emulations


def main(
    target: Path = typer.Option(..., help="Hugging Face folder of the target (config.json, *.safetensors)."),
    draft: Path = typer.Option(..., help="DeepSpec folder of the draft."),
    out: Path = typer.Option(..., help="The bundle to write, for example build/NAME."),
    backend: Backend = typer.Option("onnxruntime", help="auto: TensorRT where it loads, else TensorRT-RTX."),
    dtype: Dtype = typer.Option(
        None, help="onnxruntime: fp32, int8 (weights and activations) or int8-block64. TensorRT: fp16, bf16, or int8 (weights)."
    ),
    max_context: int = typer.Option(
        None, help="Longest cache the graphs are built for, in tokens (2048, or the target's own limit)."
    ),
    compute_capability: list[str] = typer.Option(
        [], help="tensorrt-rtx: GPUs to compile for, as 8.9 (repeatable, or with commas); this machine's, or 8.9."
    ),
    max_requests: int = typer.Option(64, help="TensorRT: requests that decode at once, at most."),
    chunk: int = typer.Option(512, help="TensorRT: prompt tokens in one pass, at most."),
    parity: bool = typer.Option(
        True, help="Compare with PyTorch, in float32; --no-parity takes little memory, whatever the model's size."
    ),
    emulate: Emulated = typer.Option(
        None, help="onnxruntime, fp32: graphs that round as TensorRT's of this dtype do, to measure what it costs."
    ),
    device: str = typer.Option("cpu", help="onnxruntime: where it will run; cuda takes fp32 only."),
    kernels: Kernels = typer.Option(
        AUTO, help="CPU, int8 or fp32: native = docs/kernels.md's operators, compiled now; auto = those for int8, if a compiler is there."
    ),
    workspace: float = typer.Option(4.0, help="TensorRT: GPU memory a kernel may take beside its operands, in GB."),
) -> None:
    """Export a target and its draft to a bundle, and check every graph against PyTorch."""
    try:
        if device != "cpu" and backend.value == "onnxruntime" and dtype and "int8" in dtype.value:
            raise ValueError(f"dtype is {dtype.value!r}; on {device} ONNX Runtime has no kernels for its products, use fp32.")
        capabilities = tuple(part.strip() for text in compute_capability for part in text.split(","))
        options = PlanOptions(capabilities, max_requests, chunk, int(workspace * 1e9))
        precision = dtype and dtype.value
        export(
            target, draft, out, backend=backend.value, dtype=precision, max_context=max_context, options=options,
            parity=parity, emulate=emulate and emulate.value, kernels=kernels.value,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("export: ended; nothing was written.", file=sys.stderr)
        raise typer.Exit(130)
    except (ValueError, FileNotFoundError) as error:
        print(f"export: {error}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
