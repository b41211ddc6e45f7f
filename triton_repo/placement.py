"""Where the model `dspark` runs: on the CPU, or an instance on each of some GPUs.

Knows: Triton's instance groups, and what the python backend tells an instance of its device. Refuses to know: engines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tritonclient.grpc import model_config_pb2 as pb

CPU, GPU = "cpu", "gpu"  # names of the configurations: configs/NAME.pbtxt, --model-config-name=NAME


@dataclass(frozen=True)
class Placement:
    """gpus: their indices as the server sees them, one instance on each; none: the CPU, with `instances` instances."""

    gpus: tuple[int, ...] = ()
    instances: int = 1

    @classmethod
    def of(cls, device: str) -> "Placement":
        """From "cpu", "cuda" (GPU 0) or "cuda:0,1,..". Raises ValueError, one sentence, for anything else."""
        if device == "cpu":
            return cls()
        found = re.fullmatch(r"cuda(?::(\d+(?:,\d+)*))?", device)
        gpus = tuple(int(n) for n in (found[1] or "0").split(",")) if found else ()
        if not gpus or len(set(gpus)) != len(gpus):
            allowed = "cpu, cuda, or cuda: with different GPU numbers (cuda:0,1)"
            raise ValueError(f"device is {device!r}; it must be {allowed}.")
        return cls(gpus)

    @property
    def name(self) -> str:
        """Of the configuration that has this placement."""
        return GPU if self.gpus else CPU

    def groups(self) -> list[pb.ModelInstanceGroup]:
        """count is an instance a GPU, all in processes of their own."""
        if self.gpus:
            return [pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_GPU, gpus=self.gpus)]
        return [pb.ModelInstanceGroup(count=self.instances, kind=pb.ModelInstanceGroup.KIND_CPU)]


def device_of(args: dict[str, str]) -> str | None:
    """The device of a python-backend instance, from what `initialize` is given: "cuda:N" of a KIND_GPU instance, whose
    model_instance_device_id is N; None of any other: its engines choose."""
    return f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else None
