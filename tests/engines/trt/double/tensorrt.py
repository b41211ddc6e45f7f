"""TensorRT's runtime on a Gpu: plans that name an ONNX graph, executed by ONNX Runtime on the memory behind their
addresses. A stand-in for the module, of what the runner uses of it.

Execution contexts answer False where TensorRT does (and log why); what it would do wrong in silence is a problem.
"""

from __future__ import annotations

import enum
import json
import weakref
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort

from .gpu import Gpu, Work, read_host

VERSION, SCRATCH = "11.4.0.106", 4096
MAGIC = b"DOUBLE"
NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "bool": "BOOL"}


def plan_bytes(entry: dict, folder: Path, profiles: list[dict]) -> bytes:
    """The plan of an engine's manifest entry in `folder`."""
    tensors = {k: [[t["name"], t["dtype"], t["shape"]] for t in entry[k]] for k in ("inputs", "outputs")}
    return MAGIC + json.dumps({"onnx": str(folder / entry["path"]), "profiles": profiles, **tensors}).encode()


@cache
def session(path: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Tensor:
    def __init__(self, name: str, dtype: str, shape: list):
        self.name, self.dtype, self.shape = name, np.dtype(dtype), shape

    def sized(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(sizes[n] if isinstance(n, str) else n for n in self.shape)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape)) * self.dtype.itemsize


class Living:
    """Counted while it is not collected."""

    def __init__(self, gpu: Gpu):
        gpu.living.add(key := id(self))
        weakref.finalize(self, gpu.living.discard, key)


class Engine(Living):
    def __init__(self, module: Module, plan: dict):
        super().__init__(module.gpu)
        self.module, self.gpu, self.profiles = module, module.gpu, plan["profiles"]
        self.onnx = plan["onnx"]
        self.name = Path(self.onnx).parent.name
        self.inputs = {t[0]: Tensor(*t) for t in plan["inputs"]}
        self.outputs = {t[0]: Tensor(*t) for t in plan["outputs"]}
        self.values = set(self.profiles[0]["values"])
        self.aliases = {n: past for n in self.outputs if (past := n.replace("present.", "past_key_values.")) != n}

    @property
    def num_io_tensors(self):
        return len(self.inputs) + len(self.outputs)

    @property
    def num_optimization_profiles(self):
        return len(self.profiles)

    @property
    def device_memory_size_v2(self):
        return SCRATCH

    def get_tensor_name(self, index):
        return [*self.inputs, *self.outputs][index]

    def get_tensor_dtype(self, name):
        tensor = self.inputs.get(name) or self.outputs[name]
        return SimpleNamespace(name=NAMES[str(tensor.dtype)])

    def get_tensor_shape(self, name):
        return [n if isinstance(n, int) else -1 for n in (self.inputs.get(name) or self.outputs[name]).shape]

    def get_tensor_location(self, name):
        return self.module.TensorLocation.HOST if name in self.values else self.module.TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name):
        return self.aliases.get(name)

    def create_runtime_config(self):
        return SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)

    def create_execution_context(self, strategy):
        if self.gpu.due("create_execution_context"):
            return self.module.log_error("no memory for another context")
        return Context(self)


class Context(Living):
    def __init__(self, engine: Engine):
        super().__init__(engine.gpu)
        self.engine, self.gpu = engine, engine.gpu
        self.version, self.profile, self.scratch = 0, None, None
        self.shapes: dict[str, tuple] = {}
        self.addresses: dict[str, int] = {}
        self.settled = -1  # the version of the last run that was not recorded

    def refuse(self, why: str) -> bool:
        self.engine.module.log_error(f"{self.engine.name}: {why}")
        return False

    def set_device_memory(self, memory, size):
        self.version += 1
        if size < SCRATCH or memory % 256:
            self.gpu.complain(f"{self.engine.name}: {size} bytes of working memory at {memory:#x}")
        self.scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self.gpu.stream(stream_handle, "set_optimization_profile_async")
        self.version += 1
        self.profile, self.shapes = profile_index, {}
        return 0 <= profile_index < len(self.engine.profiles)

    def set_input_shape(self, name, shape):
        self.version += 1
        tensor = self.engine.inputs.get(name)
        if tensor is None or not isinstance(shape, tuple) or len(shape) != len(tensor.shape) or self.profile is None:
            return self.refuse(f"set_input_shape({name!r}, {shape})")
        sizes = self.engine.profiles[self.profile]["sizes"]
        for want, have in zip(tensor.shape, shape):
            least, _, most = sizes[want] if isinstance(want, str) else (want, want, want)
            if not least <= have <= most:
                return self.refuse(f"{name} {shape} is outside profile {self.profile}")
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, memory):
        self.version += 1
        if name not in self.engine.inputs and name not in self.engine.outputs or not memory:
            return self.refuse(f"set_tensor_address({name!r}, {memory})")
        if name not in self.engine.values and memory % 256:
            self.gpu.complain(f"{self.engine.name}: the address {memory:#x} of {name} is not aligned")
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        gpu, engine = self.gpu, self.engine
        stream = gpu.stream(stream_handle, "execute_async_v3")
        if gpu.due("execute_async_v3"):
            return self.refuse("told to fail")
        wanted = {n for n in engine.inputs if n not in engine.values}
        if missing := wanted - self.shapes.keys():
            return self.refuse(f"no shape of {sorted(missing)[0]}")
        if missing := (engine.inputs.keys() | engine.outputs.keys()) - self.addresses.keys():
            return self.refuse(f"no address of {sorted(missing)[0]}")
        if self.scratch is None:
            return self.refuse("no working memory")
        for present, past in engine.aliases.items():
            if self.addresses[present] != self.addresses[past]:
                gpu.complain(f"{engine.name}: {present} does not lie where {past} does")
        if stream.recording is None:
            self.settled = self.version
        elif self.settled != self.version:
            gpu.complain(f"{engine.name}: recorded before it ran once with these shapes")
        gpu.put(stream, self._work(dict(self.shapes), dict(self.addresses)))
        return True

    def _work(self, shapes: dict[str, tuple], addresses: dict[str, int]) -> Work:
        engine, gpu = self.engine, self.gpu
        sizes: dict[str, int] = {}
        for name, shape in shapes.items():
            for want, have in zip(engine.inputs[name].shape, shape):
                if isinstance(want, str) and sizes.setdefault(want, have) != have:
                    gpu.complain(f"{engine.name}: {want} is {sizes[want]} and {have}")
        values = {n: read_host(addresses[n], engine.inputs[n].dtype, 1) for n in engine.values}
        tensors = {n: (t, t.sized(sizes)) for n, t in {**engine.inputs, **engine.outputs}.items() if n not in values}

        def check():
            gpu.find(*self.scratch, f"{engine.name}'s working memory")
            for name, (tensor, shape) in tensors.items():
                gpu.find(addresses[name], tensor.nbytes(shape), f"{engine.name}'s {name}")

        def run():
            if (error := gpu.due("execution")) is not None:
                gpu.sticky = error
                return
            binding = session(engine.onnx).io_binding()
            for name, (tensor, shape) in tensors.items():
                size = tensor.nbytes(shape)
                place = gpu.bytes(addresses[name], size, name).ctypes.data if size else values_place
                bind = binding.bind_input if name in engine.inputs else binding.bind_output
                bind(name, "cpu", 0, tensor.dtype.type, shape, place)
                if name in engine.outputs:
                    gpu.tensors[addresses[name]] = (name, size)
            for name, value in values.items():
                binding.bind_cpu_input(name, value)
            session(engine.onnx).run_with_iobinding(binding)
            gpu.launches[engine.name] += 1

        values_place = np.zeros(8).ctypes.data
        return Work(engine.name, check, run, self, self.version)


class Module:
    """The module: `import tensorrt` (or tensorrt_rtx) gives it."""

    __version__ = VERSION
    TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
    ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])
    CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    class ILogger:
        def __init__(self):
            pass

    def __init__(self, gpu: Gpu):
        self.gpu, self.logger, self.opened = gpu, None, 0

    def log_error(self, text: str) -> None:
        self.logger.log(self.Severity.ERROR, text)

    def Runtime(self, logger):
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self._open)

    def _open(self, serialized_engine):
        self.opened += 1
        data = bytes(serialized_engine)
        if not data.startswith(MAGIC) or self.gpu.due("deserialize_cuda_engine"):
            return self.log_error("not a plan")
        return Engine(self, json.loads(data[len(MAGIC) :]))
