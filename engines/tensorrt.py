"""The five engines on TensorRT or TensorRT-RTX: plans, caches and everything between two engines in GPU memory.

Knows: which engine feeds which, what the host may see (ids, counts, statistics), the sizes that plans were compiled
for. Refuses to know: CUDA and TensorRT calls (engines/trt), requests, schedules. Has never run on a GPU: its tests run
it on a double of both runtimes.

A call returns when its work is queued. Logits, features, hidden states and distributions are DeviceArrays; the rest is
numpy's and waited for when it is first read. Arguments may be numpy's, DeviceArrays, or anything with
__cuda_array_interface__ (pycuda, cupy, torch).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .autoregressive import RowsBatch, StepsBatch
from .base import (
    BackboneBatch,
    BackboneResult,
    ConfidenceBatch,
    ConfidenceResult,
    MarkovBatch,
    MarkovResult,
    PassLimits,
    TargetBatch,
    TargetResult,
    VerifyBatch,
    VerifyResult,
    additive_mask,
)
from .bundle import Bundle, EngineSpec
from .feeds import check_rows
from .specs import masks_of
from .trt.array import DeviceArray
from .trt.caches import DeviceCaches
from .trt.context import Library
from .trt.cuda import Cuda, DeviceError
from .trt.log import BuildLog, logger_for
from .trt.padding import pad_backbone, pad_rows, pad_target, wider
from .trt.plans import check_bundle, compiled_for
from .trt.pool import Pool
from .trt.runner import STORED, Runner

TO_HOST = ("draft_tokens", "draft_indices", "confidence_logits", "accepted", "next_tokens", "complete", "log_probs")
GRAPHS = 32  # recorded launches an engine
KEPT_PASSES = 2  # feature rows that may wait for the draft, in passes of the largest size
LEAST_CAPACITY = 256
PASS_WORTH = 1 << 15  # not measured: a GPU's slots are cheaper than a CPU's


class TensorRtEngines:
    """`engines.base.Engines` for a TensorRT bundle on GPU `device`. `graphs`: launches recorded an engine, 0 = none.

    Raises BundleError for a bundle that does not fit this machine, before anything is opened; DeviceError or
    DeviceMemoryError, one sentence, for what goes wrong on the GPU, then and later."""

    pass_worth = PASS_WORTH

    def __init__(self, bundle: Bundle, *, device: int = 0, graphs: int = GRAPHS):
        api, plans = check_bundle(bundle, device)
        self.bundle = bundle
        self.limits, profiles = compiled_for(bundle)
        self.verify_rows, self.threads = self.limits.wide_rows, 1
        rows = profiles["backbone"][-1].sizes["F"][2]
        self.pass_limits = PassLimits(self.limits.requests, self.limits.chunk, rows, KEPT_PASSES * rows)
        self.target_capacity = self.draft_capacity = self._capacity(1)
        self._runners: dict[str, Runner] = {}
        self.cuda = Cuda(device)
        try:
            self.provider = f"{api.backend} {api.version}, {self.cuda.name()}"
            log = BuildLog()
            self._logger = logger_for(api.trt, log)
            self._library = Library(api, self.cuda, api.trt.Runtime(self._logger), log)
            for name, spec in bundle.engines.items():
                self._runners[name] = Runner(
                    self._library, name, spec, plans[name], profiles[name], to_host=TO_HOST, most_graphs=graphs
                )
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        """All memory that calls need, so that a lack of it shows now."""
        cuda, t, d = self.cuda, self.bundle.target, self.bundle.draft
        self.caches = {}
        for name, spec in (("target", t), ("backbone", d)):
            shapes = dict(zip(self._runners[name].cache_names, spec.cache_shapes))
            dtype = _cache_dtype(self.bundle.engines[name])
            self.caches[name] = DeviceCaches(cuda, shapes, self.limits.requests, self.limits.cache, dtype)
        working = max(runner.working_memory for runner in self._runners.values())
        scratch = (cuda.allocate(max(working, 1), "working memory of the plans"), working)  # one engine runs at a time
        for runner in self._runners.values():
            runner.allocate(scratch)
        buffers = self._runners["target"].buffers
        features = buffers["features"]
        rows = self.pass_limits.kept_rows + 2 * len(features)  # a step's own, and what frees are scattered over
        pool = Pool(cuda, "features that wait for the draft", rows, features.shape[1])
        buffers["features"] = replace(features, pool=pool)
        self.caches["markov"] = self.caches["backbone"]  # a draft's steps read what its rows wrote
        self._masks = {name: masks_of(spec) for name, spec in self.bundle.engines.items()}
        cuda.synchronize()

    @property
    def cache_bytes(self) -> int:
        return sum(self.caches[name].nbytes for name in ("target", "backbone"))

    @property
    def recorded(self) -> dict[str, int]:
        """{engine: launches recorded as CUDA graphs now}."""
        return {name: len(runner.graphs) for name, runner in self._runners.items()}

    def target(self, batch: TargetBatch) -> TargetResult:
        N, M = len(batch.token_ids), len(batch.logit_rows)
        result = self._cached("target", batch, pad_target)
        return TargetResult(result.logits[:M], result.features[:N])

    def backbone(self, batch: BackboneBatch | RowsBatch) -> BackboneResult:
        result = self._cached("backbone", batch, pad_rows if isinstance(batch, RowsBatch) else pad_backbone)
        return BackboneResult(result.hidden, result.base_logits)

    def _cached(self, name: str, batch, pad):
        """Runs an engine with caches on the rows from batch.first_row on, widened by `pad`; one that has no cache after
        all runs as it is."""
        if not self._runner(name).cache_names:
            return self._plain(name, batch)
        runner, first, batch = self._runner(name), batch.first_row, self._taken(name, batch)
        check_rows(name, first, _row_sizes(batch.mask), self.limits.requests, self.target_capacity)
        masks = self._masks[name].items()
        nothing = lambda m, dtype: np.broadcast_to(additive_mask(np.False_, dtype), getattr(batch, m).shape)
        profile = runner.profile(batch.__dict__ | {m: nothing(m, dtype) for m, dtype in masks})  # by shapes alone
        batch = pad(batch, runner.profiles[profile])
        caches = self.caches[name]
        feeds = batch.__dict__ | {m: additive_mask(getattr(batch, m), dtype) for m, dtype in masks}
        return runner.run(feeds, profile, lambda cache: caches.address(cache, first))

    def _taken(self, name: str, batch):
        """The batch with other libraries' GPU arrays as DeviceArrays."""
        foreign = {
            field: DeviceArray.of(self.cuda, array, f"{name}: {field}")
            for field, array in batch.__dict__.items()
            if hasattr(array, "__cuda_array_interface__") and not isinstance(array, DeviceArray)
        }
        return replace(batch, **foreign) if foreign else batch

    def markov(self, batch: MarkovBatch | StepsBatch) -> MarkovResult:
        return self._cached("markov", batch, lambda as_it_is, profile: as_it_is)

    def confidence(self, batch: ConfidenceBatch) -> ConfidenceResult:
        return self._plain("confidence", batch)

    def verify(self, batch: VerifyBatch) -> VerifyResult:
        batch = self._taken("verify", batch)
        if not len(batch.sample_index):  # nothing reads them: what lies there will do, and nothing is sent
            batch = replace(batch, draft_probs=self._runner("markov").buffers["draft_probs"][:1])
        if isinstance(logits := batch.logits, DeviceArray):  # rows that nobody asks for make the launch one of few
            most = self._runner("verify").profiles[0].sizes["M"][2]
            batch = replace(batch, logits=logits.widened(wider(len(logits), most)) or logits)
        return self._plain("verify", batch)

    def _plain(self, name: str, batch):
        runner, feeds = self._runner(name), self._taken(name, batch).__dict__
        return runner.run(feeds, runner.profile(feeds))

    def _runner(self, name: str) -> Runner:
        if not self._runners:
            raise DeviceError("these engines are closed; load the bundle again.")
        self.cuda.enter()
        return self._runners[name]

    def ensure_capacity(self, rows: int, length: int) -> None:
        """Sets how much of the caches attention reads; they lie there from the start. Raises ValueError, one sentence,
        for more than they hold."""
        self._runner("target")
        if rows > self.limits.requests or length > self.limits.cache:
            raise ValueError(
                f"{rows} requests of {length} positions do not fit the plans' caches ({self.limits.requests} rows of "
                f"{self.limits.cache}); export again with a larger --max-requests or --max-context."
            )
        self.target_capacity = self.draft_capacity = self._capacity(length)

    def _capacity(self, length: int) -> int:
        """In steps of a quarter of a power of two: attention reads it all, and each has launches of its own."""
        return min(wider(max(length, LEAST_CAPACITY), self.limits.cache), self.limits.cache)

    def move_row(self, source: int, destination: int, target_length: int, draft_length: int) -> None:
        self._runner("target")
        self.caches["target"].move_row(source, destination, target_length)
        self.caches["backbone"].move_row(source, destination, draft_length)

    def close(self) -> None:
        """Waits for what is queued and frees everything; may be called again, and after a failure."""
        self.cuda.settle()
        for runner in self._runners.values():
            runner.close()
        self._runners = {}
        self._library = self._logger = None
        self.cuda.close()


def _row_sizes(mask) -> dict[str, int]:
    return {"R": mask.shape[0], "C": mask.shape[-1]}


def _cache_dtype(spec: EngineSpec) -> str:
    dtype = next(s.dtype for s in spec.inputs if s.name.startswith("past_key_values."))
    return STORED.get(dtype, dtype)
