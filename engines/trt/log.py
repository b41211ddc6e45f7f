"""What a builder says while it compiles: kept, and read for what a plan is made of.

Knows: the builder's messages; with DETAILED profiling a VERBOSE message lists the plan's kernels and the ONNX nodes in
each, which is what an engine inspector would say, and needs no GPU. Refuses to know: how a build is run.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType

KERNEL = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)$")
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
MEMORY = re.compile(r"Total (?P<what>Activation|Weights) Memory: (?P<bytes>\d+) bytes")
FUSED_ATTENTION = re.compile(r"mha|flash|fused_attention", re.I)
NO_KERNEL = "not supported by a dedicated kernel"
ERRORS, KEPT = ("ERROR", "INTERNAL_ERROR"), 4_000


@dataclass(frozen=True)
class Kernel:
    """One kernel of a plan: its name, kind, tactic and the ONNX nodes it computes."""

    name: str
    kind: str
    tactic: str
    nodes: tuple[str, ...]

    @property
    def fused_attention(self) -> bool:
        return bool(FUSED_ATTENTION.search(self.name))


@dataclass
class BuildLog:
    """`errors`: the builder's own, oldest first; `kernels`: of the plan, in its order; `memory`: bytes by what."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def add(self, severity: str, text: str) -> None:
        if severity in ERRORS:
            self.errors.append(text[:KEPT])
        elif severity == "WARNING":
            self.warnings.append(text[:KEPT])
        elif text.lstrip().startswith("Layers:"):
            self.kernels = kernels(text)
        elif found := MEMORY.search(text):
            self.memory[found["what"].lower()] = int(found["bytes"])

    def reason(self) -> str:
        """The last error in one line, without the compiler's source lines."""
        text = " ".join((self.errors or ["the builder gave no reason"])[-1].split())
        return re.sub(r"^IBuilder::buildSerializedNetwork: ", "", text)[:400].rstrip(" .")

    def no_attention_kernel(self) -> bool:
        return any(NO_KERNEL in text for text in self.errors)


def kernels(text: str) -> list[Kernel]:
    """The kernels of a "Layers:" message."""
    found = []
    for line in text.splitlines():
        if match := KERNEL.match(line.strip()):
            head, _, metadata = match["rest"].partition("Metadata:")
            tactic = re.search(r"TacticName: ([^,]*)", head)
            nodes = tuple(ONNX_NODE.findall(metadata))
            found.append(Kernel(match["name"], match["kind"], tactic[1].strip() if tactic else "", nodes))
        elif line.startswith("I/O Tensors"):
            break
    return found


def unfused(plan: list[Kernel], attentions: tuple[str, ...], profiles: int) -> tuple[str, ...]:
    """Those of the ONNX nodes `attentions` that lack a fused attention kernel in some of a plan's profiles."""
    fused = Counter(node for kernel in plan if kernel.fused_attention for node in set(kernel.nodes))
    return tuple(name for name in attentions if fused[name] < profiles)


def logger_for(trt: ModuleType, log: BuildLog):
    """An ILogger that fills `log`."""

    class Logger(trt.ILogger):
        def __init__(self):
            super().__init__()

        def log(self, severity, msg):
            log.add(severity.name, msg)

    return Logger()
