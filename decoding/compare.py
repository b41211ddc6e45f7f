"""Greedy equality: the same prompts with the draft and with the target alone, and what a difference is worth.

Knows: two runs of the loop, the top-two gap of the target's logits. Refuses to know: files, formats.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engines import Engines

from .generate import Answer, decode_all, progress
from .loop import Loop
from .pack import pack_target
from .schedule import NoDraft, Scheduler


def compare(engines: Engines, answers: list[Answer], batches: list[int], scheduler: Scheduler, near_tie: float) -> dict:
    """Decodes `answers` greedily: with the target alone one by one (the reference), then with `scheduler` in batches of
    each size. Returns counts; a difference counts as a near-tie when the target's top two logits after the common
    prefix lie less than `near_tie` apart. Raises ValueError when an answer was refused."""
    if refused := [a.error for a in answers if a.error]:
        raise ValueError(refused[0])
    with progress(len(answers) * (1 + len(batches)), "comparing") as advance:
        reference = _outputs(engines, NoDraft(), answers, 1, advance)[0]
        runs, different, near_ties = [], 0, 0
        for size in batches:
            outputs, loop = _outputs(engines, scheduler, answers, size, advance)
            equal, gaps = 0, []
            for answer, want, have in zip(answers, reference, outputs):
                if want == have:
                    equal += 1
                    continue
                at = next((k for k, (a, b) in enumerate(zip(want, have)) if a != b), min(len(want), len(have)))
                gap = top_gap(engines, [*answer.request.prompt_ids, *want[:at]])
                gaps.append({"line": answer.line, "at": at, "gap": gap})
            near = sum(g["gap"] < near_tie for g in gaps)
            different, near_ties = different + len(gaps) - near, near_ties + near
            tau = loop.metrics.acceptance_length
            runs.append(
                {"batch": size, "equal": equal, "near_ties": near, "acceptance_length": tau, "differences": gaps}
            )
    tokens = sum(len(o) for o in reference)
    return {
        "prompts": len(answers), "tokens": tokens, "near_tie_bound": near_tie, "different": different,
        "near_ties": near_ties, "runs": runs,
    }  # fmt: skip


def _outputs(engines: Engines, scheduler: Scheduler, answers: list[Answer], size: int, advance) -> tuple[list, Loop]:
    loop = Loop(engines, scheduler, max_requests=size)
    copies = []
    for i, answer in enumerate(answers):
        request = replace(answer.request, id=i, params=replace(answer.request.params, temperature=0.0))
        copies.append(Answer(answer.line, answer.id, request))
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
    return result.logits[0].copy()


def top_gap(engines: Engines, ids: list[int]) -> float:
    """Difference of the two highest logits after `ids`."""
    second, first = np.sort(next_logits(engines, ids))[-2:]
    return float(first - second)
