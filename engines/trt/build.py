"""One ONNX graph to one plan: parsed, checked against what was asked for, compiled, and its kernels looked at.

Knows: the builder's calls and how each of them fails (several answer False or None and do not raise).
Refuses to know: bundles, manifests, which graph it is.
"""

from __future__ import annotations

import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..specs import TensorSpec
from .api import Api, BuildError, aim
from .log import BuildLog, Kernel, logger_for, unfused
from .memory import PeakMemory
from .planfile import PlanFile
from .profiles import Profile, size

DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


@dataclass(frozen=True)
class Job:
    """One graph to compile. inputs: as the manifest declares them; capability: "8.9"; workspace: bytes that a kernel
    may take beside its operands; plan: the file to write; timings: what TensorRT measured before on this GPU, may be
    empty."""

    name: str
    onnx: Path
    inputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    capability: str
    workspace: int
    plan: Path
    timings: bytes = b""


@dataclass(frozen=True)
class Plan:
    """size, sha256: of the file that was written (Job.plan). attentions: ONNX names; unfused: those without a fused
    kernel in every profile. peak: bytes of memory that the build took on top of what was there. memory: activation and
    weight bytes as the builder states them."""

    size: int
    sha256: str
    kernels: tuple[Kernel, ...]
    attentions: tuple[str, ...]
    unfused: tuple[str, ...]
    seconds: float
    peak: int
    memory: dict[str, int]
    timings: bytes


def compile_graph(api: Api, job: Job, progress: Callable[[float], None] = lambda share: None) -> Plan:
    """Writes the plan of a job, whole or not at all. Attention is compiled fused; where the builder has no such kernel,
    decomposed (Plan.unfused).

    Raises BuildError, one sentence with the builder's words; KeyboardInterrupt when the user ended it."""
    with no_collection():
        try:
            plan = _attempt(api, job, progress, decompose=False)
            return plan or _attempt(api, job, progress, decompose=True)
        except BaseException as ended:
            traceback.clear_frames(ended.__traceback__)  # they hold the builder and would outlive this call
            raise


def _attempt(api: Api, job: Job, progress: Callable[[float], None], *, decompose: bool) -> Plan | None:
    """None: a fused attention was asked for and the builder has no kernel for it."""
    trt, log = api.trt, BuildLog()
    started = time.monotonic()
    with PlanFile(job.plan) as file, PeakMemory() as memory, interrupts() as interrupted:
        logger = logger_for(trt, log)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        parse(parser, job, log)
        check_inputs(network, job)
        check_caches(trt, network, job)
        attentions = attention_layers(trt, network)
        for attention in attentions:
            attention.decomposable = decompose
        config = builder.create_builder_config()
        aim(api, config, job.capability)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 in the graph is meant
        config.progress_monitor = monitor_for(trt, interrupted, progress)
        for spec in job.profiles:
            add_profile(builder, config, network, job, spec)
        cache = None
        if api.keeps_timings:
            cache = config.create_timing_cache(job.timings)
            config.set_timing_cache(cache, False)
        done = builder.build_serialized_network_to_stream(network, config, writer_for(trt, file))
        if done and not interrupted.is_set() and file.error is None:
            file.keep()
    if interrupted.is_set():
        raise KeyboardInterrupt
    if file.error is not None:
        raise BuildError(f"{job.name}: its plan cannot be written to {job.plan.parent}: {file.error.strerror}.")
    if not done:
        if attentions and not decompose and log.no_attention_kernel():
            return None
        raise BuildError(
            f"{api.backend} {api.version} did not compile {job.name} for {job.capability}: {log.reason()}."
        )
    names = tuple(attention.name for attention in attentions)
    return Plan(
        size=file.size,
        sha256=file.sha256,
        kernels=tuple(log.kernels),
        attentions=names,
        unfused=unfused(log.kernels, names, len(job.profiles)) if decompose else (),  # else it would not have built
        seconds=time.monotonic() - started,
        peak=memory.peak,
        memory=dict(log.memory),
        timings=bytes(cache.serialize()) if cache is not None else b"",
    )


def parse(parser, job: Job, log: BuildLog) -> None:
    """Raises BuildError with the first error's node and words."""
    if parser.parse_from_file(str(job.onnx)):
        return
    if not parser.num_errors:
        raise BuildError(f"{job.name}: the ONNX parser refused {job.onnx.name}: {log.reason()}.")
    error = parser.get_error(0)
    what = " ".join(error.desc().split()).rstrip(" .")
    raise BuildError(
        f"{job.name}: the ONNX parser refused node {error.node_name()!r} ({error.node_operator()}): {what[:400]}."
    )


def check_inputs(network, job: Job) -> None:
    """The network has the declared inputs with their types, and some layer reads each: parsers drop what they
    ignore."""
    found = {tensor.name: tensor for tensor in (network.get_input(i) for i in range(network.num_inputs))}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    operands = [layer.get_input(i) for layer in layers for i in range(layer.num_inputs)]
    read = {tensor.name for tensor in operands if tensor is not None}
    for spec in job.inputs:
        if spec.name not in found or spec.name not in read:
            raise BuildError(f"{job.name}: the ONNX parser dropped the input {spec.name!r}: no layer reads it.")
        tensor = found[spec.name]
        if tensor.dtype.name != DTYPES[spec.dtype]:
            raise BuildError(
                f"{job.name}: the ONNX parser made the input {spec.name!r} {tensor.dtype.name}, "
                f"the graph declares {spec.dtype}."
            )
    if extra := sorted(found.keys() - {spec.name for spec in job.inputs}):
        raise BuildError(f"{job.name}: the network has the input {extra[0]!r}, which the manifest does not declare.")


def check_caches(trt, network, job: Job) -> None:
    """Each cache that comes out is updated in place, by a layer whose output shares its input's address at run time."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    updates = sum(layer.type == trt.LayerType.KV_CACHE_UPDATE for layer in layers)
    caches = sum(network.get_output(i).name.startswith("present.") for i in range(network.num_outputs))
    if updates != caches:
        raise BuildError(f"{job.name}: it has {caches} caches, but {updates} layers that update one in place.")


def attention_layers(trt, network) -> list:
    """The network's IAttention objects."""
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class
            found.append(layer.attention)
    return found


def add_profile(builder, config, network, job: Job, spec: Profile) -> None:
    """Raises BuildError when the builder does not take the profile."""
    profile = builder.create_optimization_profile()
    shapes = {tensor.name: tensor.shape for tensor in job.inputs}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if tensor.is_shape_tensor != (tensor.name in spec.values):
            raise BuildError(
                f"{job.name}: the input {tensor.name!r} sizes others, or does not, unlike profile {spec.name!r} says."
            )
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, *([value] for value in spec.values[tensor.name]))
        else:
            profile.set_shape(tensor.name, *(size(shapes[tensor.name], spec, end) for end in range(3)))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"{job.name}: the builder does not take the optimisation profile {spec.name!r}.")


def monitor_for(trt, interrupted: threading.Event, progress: Callable[[float], None]):
    """An IProgressMonitor that tells the outermost phase's share and cancels the build once `interrupted` is set."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            super().__init__()
            self.steps: dict[str, int] = {}
            self.outer: str | None = None

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.steps[phase_name] = max(num_steps, 1)
            self.outer = self.outer or phase_name

        def step_complete(self, phase_name, step):
            if phase_name == self.outer:
                progress(min((step + 1) / self.steps[phase_name], 1.0))
            return not interrupted.is_set()

        def phase_finish(self, phase_name):
            if phase_name == self.outer:
                progress(1.0)

    return Monitor()


def writer_for(trt, file: PlanFile):
    """An IStreamWriter into `file`."""

    class Writer(trt.IStreamWriter):
        def __init__(self):
            super().__init__()

        def write(self, data):
            return file.write(data)

    return Writer()


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection meanwhile. A builder that some other thread's collection frees takes a lock of TensorRT's
    with Python's lock held; this thread, inside a builder, may hold the former and want the latter in its logger:
    neither ever goes on."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising inside the builder's callbacks; the monitor then cancels the build."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
