"""python -m export: a target and a draft checkpoint -> a checked bundle of five engines.

Knows: the order of the steps and what the user sees of them. Refuses to know: any step's inside.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path

import typer
from rich.console import Console

from .account import check_graphs
from .backbone import build_backbone
from .bundle import copy_tokenizer, draft_entry, kept_calibration, load_models, target_entry, write_manifest, written_whole
from .graph import Graph
from .heads import build_confidence, build_markov
from .lower_onnxruntime import lower
from .parity import check_parity
from .quantize import quantize
from .target import build_target
from .verify import build_verify


class Backend(str, Enum):
    onnxruntime = "onnxruntime"


class Dtype(str, Enum):
    fp32 = "fp32"
    int8 = "int8"


def build_graphs(target, draft, *, dtype: str, max_context: int) -> list[Graph]:
    """The five graphs in the order of the round, in the form of the backend."""
    graphs = [
        build_target(target, max_context),
        build_backbone(draft, max_context),
        build_markov(draft),
        build_confidence(draft),
        build_verify(draft.config.block_size, target.config.vocab_size, draft.draft_to_target().numpy()),
    ]
    for graph in graphs:
        if dtype == "int8":
            quantize(graph)
        lower(graph)
    return graphs


def export(target: Path, draft: Path, out: Path, *, backend: str = "onnxruntime", dtype: str = "fp32",
           max_context: int | None = None, console: Console | None = None) -> None:
    """Writes the bundle `out` and checks it. Raises ValueError or FileNotFoundError with one sentence."""
    console = console or Console(stderr=True)
    with written_whole(out) as partial:
        with console.status("reading checkpoints"):
            target_model, draft_model, max_context = load_models(target, draft, max_context)
        graphs = build_graphs(target_model, draft_model, dtype=dtype, max_context=max_context)
        check_graphs(graphs, target_model, draft_model)
        for graph in graphs:
            with console.status(f"writing {graph.name}"):
                graph.save(partial / "onnx" / graph.name)
        copy_tokenizer(target, partial)
        with console.status("checking parity with PyTorch"):
            parity = check_parity(partial, graphs, target_model, draft_model, target, dtype=dtype, console=console)
        with console.status("hashing"):
            entries = target_entry(target, target_model.config), draft_entry(draft, draft_model.config)
            write_manifest(
                partial, graphs, *entries, backend=backend, dtype=dtype, max_context=max_context, parity=parity,
                calibration=kept_calibration(out, *entries),
            )
    console.print(f"wrote {out}")


def main(
    target: Path = typer.Option(..., help="Hugging Face folder of the target (config.json, *.safetensors)."),
    draft: Path = typer.Option(..., help="DeepSpec folder of the draft."),
    out: Path = typer.Option(..., help="The bundle to write, for example build/NAME."),
    backend: Backend = typer.Option(Backend.onnxruntime, help="What the graphs are lowered for."),
    dtype: Dtype = typer.Option(Dtype.fp32, help="int8: 8-bit weights and activations, scaled per token or finer."),
    max_context: int = typer.Option(None, help="Longest cache the graphs are built for, in tokens (2048, or the target's own limit)."),
) -> None:
    """Export a target and its draft to a bundle, and check every graph against PyTorch."""
    try:
        export(target, draft, out, backend=backend.value, dtype=dtype.value, max_context=max_context)
    except (ValueError, FileNotFoundError) as error:
        print(f"export: {error}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
