"""Greedy equality: the same prompts with the draft and with the target alone, and what a difference is worth.

Knows: two runs of the loop, the top-two gap of the target's logits. Refuses to know: files, formats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable

import numpy as np

from engines import Engines
from engines.arrays import to_host
from engines.pack import pack_target

from .generate import Answer, decode_all, progress
from .loop import Loop
from .schedule import NoDraft, Scheduler


@dataclass(frozen=True)
class Reference:
    """What the target alone says: outputs[i] of answers[i], decoded one by one."""

    answers: list[Answer]
    outputs: list[list[int]]

    @property
    def tokens(self) -> int:
        return sum(len(o) for o in self.outputs)


def compare(engines: Engines, answers: list[Answer], batches: list[int], scheduler: Scheduler, near_tie: float) -> dict:
    """Decodes `answers` greedily: with the target alone one by one (the reference), then with `scheduler` in batches of
    each size. Returns counts; a difference counts as a near-tie when the target's top two logits after the common
    prefix lie less than `near_tie` apart. Raises ValueError when an answer was refused."""
    if refused := [a.error for a in answers if a.error]:
        raise ValueError(refused[0])
    greedy = [
        Answer(a.line, a.id, replace(a.request, params=replace(a.request.params, temperature=0.0))) for a in answers
    ]
    with progress(len(answers) * (1 + len(batches)), "comparing") as advance:
        alone = reference(engines, greedy, advance)
        runs = [difference(engines, alone, size, scheduler, near_tie, advance) for size in batches]
    return {
        "prompts": len(answers), "tokens": alone.tokens, "near_tie_bound": near_tie,
        "different": sum(run["different"] for run in runs), "near_ties": sum(run["near_ties"] for run in runs),
        "runs": runs,
    }  # fmt: skip


def reference(engines: Engines, answers: list[Answer], advance: Callable[[], None] = lambda: None) -> Reference:
    """The target alone, one request at a time. Raises ValueError when a request fails."""
    return Reference(answers, _outputs(engines, NoDraft(), answers, 1, advance)[0])


def difference(
    engines: Engines,
    alone: Reference,
    size: int,
    scheduler: Scheduler,
    near_tie: float,
    advance: Callable[[], None] = lambda: None,
) -> dict:
    """The same requests with `scheduler`, `size` at once, against the reference: counts, and where outputs part."""
    outputs, loop = _outputs(engines, scheduler, alone.answers, size, advance)
    gaps = []
    for answer, want, have in zip(alone.answers, alone.outputs, outputs):
        if want == have:
            continue
        at = next((k for k, (a, b) in enumerate(zip(want, have)) if a != b), min(len(want), len(have)))
        gap = top_gap(engines, [*answer.request.prompt_ids, *want[:at]])
        gaps.append({"line": answer.line, "at": at, "gap": gap})
    near = sum(g["gap"] < near_tie for g in gaps)
    return {
        "batch": size, "equal": len(outputs) - len(gaps), "different": len(gaps) - near, "near_ties": near,
        "acceptance_length": loop.metrics.acceptance_length, "differences": gaps,
    }  # fmt: skip


def _outputs(
    engines: Engines, scheduler: Scheduler, answers: list[Answer], size: int, advance: Callable[[], None]
) -> tuple[list[list[int]], Loop]:
    loop = Loop(engines, scheduler, max_requests=size)
    copies = [Answer(a.line, a.id, replace(a.request, id=i)) for i, a in enumerate(answers)]
    decode_all(loop, copies, lambda answer: advance())
    if failed := [a.error for a in copies if a.error]:
        raise ValueError(failed[0])
    return [a.output_ids for a in copies], loop


def next_logits(engines: Engines, ids: list[int], chunk: int = 512) -> np.ndarray:
    """[V] float32: the target's logits after `ids`, by a plain pass over them. Overwrites cache row 0."""
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        engines.ensure_capacity(1, start + len(part))
        lengths, wanted = np.array([start], np.int64), np.array([1], np.int64)
        batch, _, _ = pack_target([part], lengths, wanted, engines.target_capacity, engines.bundle.max_context)
        result = engines.target(batch)
    return to_host(result.logits[0]).copy()


def top_gap(engines: Engines, ids: list[int]) -> float:
    """Difference of the two highest logits after `ids`."""
    second, first = np.sort(next_logits(engines, ids))[-2:]
    return float(first - second)
