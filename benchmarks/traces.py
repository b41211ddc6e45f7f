"""Acceptance traces for the simulator: recorded rounds of a real head, as they were or shifted to another strength.

Knows: the file that `python -m decoding record` writes, and the small one made of it for the repository
(`python -m benchmarks.traces build/calibration/rollouts.npz benchmarks/rollouts.npz`). Refuses to know: engines,
schedulers, time.
Legend: B recorded rounds, G block size of the simulated draft, n rounds taken at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

# Acceptance lengths (bonus included) of released block-7 heads for Qwen3-4B at temperature 1 that the DSpark paper
# reports: GSM8K and MATH (maths), MBPP and HumanEval (code), MT-Bench, Alpaca and Arena-Hard (chat), averaged.
PAPER_LENGTHS = {"maths": 5.9, "code": 5.25, "chat": 3.49}
PAPER_BLOCK = 7


def sigmoid(x: ndarray) -> ndarray:
    return 1.0 / (1.0 + np.exp(-x))


@dataclass(frozen=True)
class Traces:
    """confidence [B, G] float64, calibrated; accepted [B] of a fully verified block; pools: kind -> (first, last +
    1)."""

    confidence: ndarray
    accepted: ndarray
    pools: dict[str, tuple[int, int]]
    what: str

    def length(self, kind: str) -> float:
        """Acceptance length with full blocks, bonus included."""
        first, last = self.pools[kind]
        return 1.0 + float(self.accepted[first:last].mean())


def load(path: Path, temperature: float = 1.0) -> tuple[ndarray, ndarray, ndarray]:
    """(confidence_logits [B, G], accepted [B], kind [B]) of the rounds at `temperature`, in the order of requests.

    Raises FileNotFoundError and ValueError, one sentence.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; record it with `python -m decoding record`.")
    with np.load(path, allow_pickle=False) as raw:
        missing = {"confidence_logits", "accepted", "temperature", "request", "position", "kind"} - set(raw.files)
        if missing:
            raise ValueError(f"{path} has no {sorted(missing)[0]}; record it again with `python -m decoding record`.")
        order = np.lexsort((raw["position"], raw["request"]))
        order = order[np.isclose(raw["temperature"][order], temperature)]
        if not len(order):
            raise ValueError(f"{path} has no round at temperature {temperature:g}.")
        return raw["confidence_logits"][order].astype(float), raw["accepted"][order].astype(int), raw["kind"][order]


def recorded(
    path: Path, temperatures: ndarray | None = None, bias: ndarray | float = 0.0, temperature: float = 1.0
) -> Traces:
    """The rounds as they were: our head's confidences (by its calibration: z / T + bias) and what was really
    accepted."""
    logits, accepted, kind = load(path, temperature)
    if temperatures is not None:
        logits = logits / np.asarray(temperatures) + bias
    order = np.argsort(kind, kind="stable")
    return Traces(sigmoid(logits[order]), accepted[order], _pools(kind[order]), f"recorded ({path.name})")


def shifted(path: Path, block: int, lengths: dict[str, float] = PAPER_LENGTHS, seed: int = 0) -> Traces:
    """The recorded confidences, their logits raised kind by kind until full blocks of PAPER_BLOCK reach `lengths`, cut
    to `block`.

    Keeps what a trace has and a formula has not: the spread between easy and hard places and their runs. Acceptance is
    drawn anew from the shifted confidences, so these are calibrated by construction; slots past the recorded block
    repeat its last logit.
    """
    logits, _, kind = load(path)
    order = np.argsort(kind, kind="stable")
    logits, kind = logits[order], kind[order]
    width = max(PAPER_BLOCK, block)
    logits = np.concatenate([logits, np.repeat(logits[:, -1:], max(0, width - logits.shape[1]), axis=1)], axis=1)
    pools, confidence = _pools(kind), np.empty_like(logits[:, :width])
    for name, (first, last) in pools.items():
        low, high = -20.0, 20.0
        for _ in range(60):
            shift = (low + high) / 2
            c = sigmoid(logits[first:last, :width] + shift)
            low, high = (
                (shift, high) if 1 + np.cumprod(c[:, :PAPER_BLOCK], 1).sum(1).mean() < lengths[name] else (low, shift)
            )
        confidence[first:last] = c
    confidence = confidence[:, :block]
    passed = np.random.default_rng(seed).random(confidence.shape) < confidence
    wanted = ", ".join(f"{name} {length:g}" for name, length in lengths.items())
    return Traces(
        confidence, np.cumprod(passed, 1).sum(1), pools, f"recorded, shifted to {wanted} at block {PAPER_BLOCK}"
    )


def _pools(kind: ndarray) -> dict[str, tuple[int, int]]:
    names, first, count = np.unique(kind, return_index=True, return_counts=True)
    return {str(n): (int(f), int(f + c)) for n, f, c in zip(names, first, count)}


def pack(source: Path, out: Path, most: int = 6000) -> None:
    """Writes the rounds at temperature 1 of at most `most` rounds, whole requests, as the small file that is
    shipped."""
    with np.load(source, allow_pickle=False) as raw:
        requests, counts = np.unique(raw["request"][np.isclose(raw["temperature"], 1.0)], return_counts=True)
        chosen = requests[np.cumsum(counts) <= most]
        rows = np.isin(raw["request"], chosen) & np.isclose(raw["temperature"], 1.0)
        kept = {name: raw[name][rows] for name in ("accepted", "temperature", "request", "position", "kind")}
        meta = str(raw["meta"]) if "meta" in raw.files else ""
        logits = raw["confidence_logits"][rows].astype(np.float16)
    np.savez_compressed(out, confidence_logits=logits, meta=meta, **kept)


if __name__ == "__main__":
    import typer

    typer.run(pack)
