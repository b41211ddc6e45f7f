"""The five engines on ONNX Runtime (CPU): caches updated in place, outputs written into reused buffers.

Knows: which graph runs on which caches, threads. Refuses to know: requests, sampling, schedules.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime as ort
from numpy import ndarray

from . import greedy, hugepages, native
from .autoregressive import RowsBatch, StepsBatch
from .base import (
    BackboneBatch,
    BackboneResult,
    ConfidenceBatch,
    ConfidenceResult,
    MarkovBatch,
    MarkovResult,
    TargetBatch,
    TargetResult,
    VerifyBatch,
    VerifyResult,
    additive_mask,
)
from .bundle import Bundle, EngineSpec
from .caches import ROOM, STEP, Caches
from .session import LASTING_ROWS, Graph
from .specs import masks_of

SPIN_US, DRAFT_SPIN_US = 200, 30  # an idle thread of the target's session, of the others'
# Rows of one verify call, as float32: what one step of the graph hands to the next stays in the second-level cache
# (16 rows of 49,152; with 112 a drawn row takes 1.3 to 2 times as long).
VERIFY_BYTES = 3 << 20
PASS_WORTH = 7 << 10  # measured for SmolLM2 on two cores, prompts of 8 to 64 tokens beside 1 to 15 rows
PACKED_PASS_WORTH = 1 << 20  # attention over packed rows does nothing for an empty slot


class OnnxRuntimeEngines:
    """`engines.base.Engines` on ONNX Runtime. `threads`: None = the physical cores this process may use."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, log_severity: int = 3):
        t, d = bundle.target, bundle.draft
        self.bundle = bundle
        self.verify_rows, self.pass_limits = max(1, VERIFY_BYTES // (4 * t.vocab_size)), None
        self.threads, self.provider = threads or physical_cores(), "CPUExecutionProvider"
        self.pass_worth = PACKED_PASS_WORTH if bundle.packed("target") else PASS_WORTH
        options = {
            name: session_options(self.threads, log_severity, bundle.library, spin_us=SPIN_US if name == "target" else DRAFT_SPIN_US)
            for name in bundle.engines
        }
        caches_of = lambda spec, name: Caches(
            spec.cache_shapes, cache_dtype(bundle.engines[name]), ROOM if bundle.packed(name) else STEP
        )
        self.target_caches, self.draft_caches = caches_of(t, "target"), caches_of(d, "backbone")
        caches = {"target": self.target_caches, "backbone": self.draft_caches, "markov": self.draft_caches}
        hugepages.gather()
        before = hugepages.places()
        self._graphs = {
            name: Graph(bundle.folder / spec.path, spec, options[name], caches.get(name), "features" if name == "target" else None)
            for name, spec in bundle.engines.items()
        }
        hugepages.ask(hugepages.places() - before)  # what the sessions took: their weights
        self._masks = {name: masks_of(spec) for name, spec in bundle.engines.items()}

    @property
    def target_capacity(self) -> int:
        return self.target_caches.capacity

    @property
    def cache_bytes(self) -> int:
        return self.target_caches.nbytes + self.draft_caches.nbytes

    @property
    def draft_capacity(self) -> int:
        return self.draft_caches.capacity

    def target(self, batch: TargetBatch) -> TargetResult:
        result = self._cached("target", batch)
        return TargetResult(**result, lasting=len(result["features"]) <= LASTING_ROWS)

    def backbone(self, batch: BackboneBatch | RowsBatch) -> BackboneResult:
        return BackboneResult(**self._cached("backbone", batch))

    def markov(self, batch: MarkovBatch | StepsBatch) -> MarkovResult:
        return MarkovResult(**self._cached("markov", batch))

    def _cached(self, name: str, batch) -> dict[str, ndarray]:
        """Runs an engine that may read or write caches, on the rows from batch.first_row on."""
        feeds = batch.__dict__ | {m: additive_mask(getattr(batch, m), dtype) for m, dtype in self._masks[name].items()}
        return self._graphs[name].run(feeds, feeds.pop("first_row", 0))

    def confidence(self, batch: ConfidenceBatch) -> ConfidenceResult:
        return ConfidenceResult(**self._graphs["confidence"].run(batch.__dict__))

    def verify(self, batch: VerifyBatch) -> VerifyResult:
        if greedy.is_plain(batch):
            return greedy.verify(batch)
        return VerifyResult(**self._graphs["verify"].run(batch.__dict__))

    def ensure_capacity(self, rows: int, length: int) -> None:
        self.target_caches.ensure(rows, length)
        self.draft_caches.ensure(rows, length)

    def move_row(self, source: int, destination: int, target_length: int, draft_length: int) -> None:
        self.target_caches.move_row(source, destination, target_length)
        self.draft_caches.move_row(source, destination, draft_length)

    def close(self) -> None:
        self._graphs.clear()
        self.target_caches.tensors.clear()
        self.draft_caches.tensors.clear()


def session_options(
    threads: int, log_severity: int = 3, library: Path | None = None, *, spin_us: int = SPIN_US
) -> ort.SessionOptions:
    """`threads` intra-op threads, one operator at a time. Five sessions share the cores: an idle thread spins for `spin_us`, long
    enough for the next operator, too short to be in the way of the next session. `log_severity` 3 = errors only, 2 = warnings
    too. library: the bundle's operators."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = log_severity
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
    if library:
        native.register(options, library)
    return options


def physical_cores() -> int:
    """Physical cores among the CPUs this process may run on (siblings counted once), at least 1."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in cpus:
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(file.read_text().strip() if file.is_file() else str(cpu))
    return max(1, len(cores))


def cache_dtype(spec: EngineSpec) -> str:
    """Of a graph's key-value caches."""
    return next((s.dtype for s in spec.inputs if s.name.startswith("past_key_values.")), "float32")
