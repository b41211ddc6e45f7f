"""The exported graphs of a bundle compiled to TensorRT plans: what is announced before, shown while, and said after.

Knows: the order of graphs and GPUs, what a user sees. Refuses to know: the builder (engines/trt), how graphs are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engines.specs import TensorSpec
from engines.trt.api import Api, chosen_capabilities, load_api
from engines.trt.plans import Built, Compiler, GraphFile
from engines.trt.profiles import Limits, limits_for
from training.draft import DraftModel
from training.target import TargetModel

from .graph import Graph

BASE_BYTES, WEIGHT_COPIES = 400 << 20, 2.6  # what a build was seen to take: the library, and the weights so many times
TABLE_WIDTH = 110


@dataclass(frozen=True)
class PlanOptions:
    """capabilities: "8.9", ... (empty: engines/trt/api.py chooses); max_requests and chunk (prompt tokens a pass) bound
    the optimisation profiles; workspace: bytes of GPU memory that a kernel may take beside its operands."""

    capabilities: tuple[str, ...] = ()
    max_requests: int = 64
    chunk: int = 512
    workspace: int = 4_000_000_000


@dataclass(frozen=True)
class Planner:
    """A builder that is there, the GPUs it compiles for, and what was asked of it."""

    api: Api
    capabilities: list[str]
    options: PlanOptions

    @classmethod
    def of(cls, backend: str, options: PlanOptions) -> Planner:
        """Raises ValueError, one sentence: no such package, a GPU it does not know, a workspace outside its range."""
        if options.workspace < 1 << 20:
            raise ValueError(f"workspace is {options.workspace} bytes; it must be 1 MB or more.")
        limits_for(requests=options.max_requests, chunk=options.chunk, block=1, vocab=1, max_context=1)
        api = load_api(backend)
        return cls(api, chosen_capabilities(api, list(options.capabilities)), options)

    def limits(self, target: TargetModel, draft: DraftModel, max_context: int) -> Limits:
        o = self.options
        return limits_for(
            requests=o.max_requests,
            chunk=o.chunk,
            block=draft.config.block_size,
            vocab=target.config.vocab_size,
            max_context=max_context,
            sample_from_anchor=draft.config.sample_from_anchor,
            autoregressive=draft.config.kind != "parallel",
        )

    def compile(
        self,
        partial: Path,
        graphs: list[Graph],
        entries: dict[str, dict],
        limits: Limits,
        *,
        previous: Path,
        console: Console,
    ) -> dict:
        """Writes partial/plans/, adds `plans` to the manifest's engine entries, and returns its `tensorrt`.

        previous: a bundle whose plans are kept where nothing changed. Raises BuildError, one sentence;
        KeyboardInterrupt when the user ended a build."""
        api = self.api
        timings = previous.parent / f"timings-{api.version}.cache" if api.keeps_timings else None
        compiler = Compiler(api, limits, self.options.workspace, timings)
        largest = max(sum(array.nbytes for array in g.weights.values()) for g in graphs)
        console.print(
            f"compiling {len(graphs)} graphs with {api.backend} {api.version} for {', '.join(self.capabilities)}: "
            f"about {(BASE_BYTES + WEIGHT_COPIES * largest) / 1e9:.1f} GB of memory at most; "
            f"Ctrl-C leaves what was there before"
        )
        built = []
        for graph in graphs:
            entry = entries[graph.name]
            inputs = tuple(TensorSpec(s.name, s.dtype, s.shape) for s in graph.inputs)
            file = GraphFile(graph.name, partial / entry["path"], entry["sha256"], entry.get("data_sha256", ""), inputs)
            for capability in self.capabilities:
                text = f"compiling {graph.name} for {capability}"
                with console.status(text) as status:
                    result = compiler.compile(
                        file, capability, partial, previous, lambda share: status.update(f"{text}: {share:.0%}")
                    )
                for name in result.unfused:
                    console.print(
                        f"warning: {graph.name}, layer {name}: no fused attention kernel for {capability}; "
                        f"it is decomposed"
                    )
                built.append(result)
                entry.setdefault("plans", {})[capability] = result.entry
        console.print(table_of(built), width=max(console.width, TABLE_WIDTH))
        return compiler.settings()


def table_of(built: list[Built]) -> Table:
    table = Table("engine", "GPU", "kernels", "attention", "MB", "seconds", "peak MB", "")
    for b in built:
        e, nodes = b.entry, b.entry["attention"]["nodes"]
        fused = f"{nodes - len(b.unfused)} of {nodes} fused" if nodes else ""
        table.add_row(
            b.engine, b.capability, str(e["kernels"]), fused, f"{e['bytes'] / 1e6:.1f}", f"{e['seconds']:.1f}",
            f"{e['peak_bytes'] / 1e6:.0f}", "kept" if b.reused else "compiled",
        )  # fmt: skip
    return table
