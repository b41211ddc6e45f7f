"""How far an exported graph may be from PyTorch, by dtype and engine.

Knows: numbers. Refuses to know: graphs, how the difference is taken. A wrong transpose or a dropped layer lies far
outside every gate.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """cosine: at least; norm: most |ratio - 1|; relative: most max abs over the reference's largest magnitude; draw:
    slack, in probability, of the interval in which a drawn token's uniform lies, and, over the largest score, of a
    pick."""

    cosine: float
    norm: float = float("inf")
    relative: float = float("inf")
    draw: float = 1e-5

    def passes(self, cosine: float, norm_ratio: float, relative: float) -> bool:
        return cosine >= self.cosine and abs(norm_ratio - 1) <= self.norm and relative <= self.relative


FP32 = Gate(cosine=0.99999, relative=1e-3)
INT8 = Gate(cosine=0.99, norm=0.05)
FP16 = Gate(cosine=0.9999, norm=0.01, draw=5e-3)
BF16 = Gate(cosine=0.997, norm=0.03, draw=4e-2)
W8A16 = Gate(cosine=0.998, norm=0.03, draw=5e-3)  # against the weights before they were rounded
MARKOV_INT8 = Gate(cosine=0.999, norm=0.02, draw=1e-2)  # the bias in blocks of 64, added to base logits in float32
STEPS_INT8 = Gate(cosine=0.99, norm=0.05, draw=5e-2)
GATES = {  # dtype -> engine ("steps": the markov engine of an autoregressive draft) -> gate; FP32 where none is named
    "int8": {"target": INT8, "backbone": INT8, "markov": MARKOV_INT8, "steps": STEPS_INT8},
    "int8-block64": {"target": INT8, "backbone": INT8, "markov": MARKOV_INT8, "steps": STEPS_INT8},
    "fp16": dict.fromkeys(("target", "backbone", "markov", "steps", "confidence"), FP16),
    "w8a16": {"target": W8A16, "backbone": W8A16, "markov": FP16, "steps": W8A16, "confidence": FP16},
    "bf16": dict.fromkeys(("target", "backbone", "markov", "steps", "confidence"), BF16),
}


def gate_of(dtype: str, engine: str) -> Gate:
    return GATES.get(dtype, {}).get(engine, FP32)
