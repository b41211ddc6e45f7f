"""The audit of a bundle: does any schedule change what the target says? For users with their own models.

Knows: greedy equality with near-tie accounting, coupled equality, what a bundle must hold, the order of the checks.
Refuses to know: how a schedule decides, how drawn tokens are tested (draws.py), how a check is shown (checks.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Callable, Iterator

import numpy as np

from engines import BundleError, Engines
from engines.sps import Sps

from .chat import ChatTokenizer
from .checks import Check
from .compare import Reference, difference, reference
from .draws import sampled
from .generate import Answer
from .request import Request, SamplingParams
from .schedule import SCHEDULES, NoDraft, Scheduler, make

TEXTS = (
    "Write three sentences about the sea.", "What is 17 * 23? Think step by step.", "def fibonacci(n):",
    "Explain to a child why the sky is blue.", "List five uses for a brick:", "The capital of France is",
    "Write a Python function that reverses a string.", "Tom has 12 apples and gives a third away. How many are left?",
    "Translate to French: good morning, my friend.", "Once upon a time, in a small village,",
    "Give me a recipe for a quick soup.", "SELECT name, COUNT(*) FROM orders WHERE",
)  # fmt: skip
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Effort:
    """batches: requests at once in the equality checks; prompts of them; tokens a prompt at most; samples,
    sample_tokens and sample_batch of the statistical test."""

    batches: tuple[int, ...] = (1, 4, 8)
    prompts: int = 8
    tokens: int = 32
    samples: int = 160
    sample_tokens: int = 12
    sample_batch: int = 16


QUICK = Effort(batches=(6,), prompts=5, tokens=20, samples=64, sample_tokens=8)


def default_answers(engines: Engines, tokenizer: ChatTokenizer | None) -> list[Answer]:
    """TEXTS as raw prompts, or 12 prompts of random ids where the bundle has no tokenizer."""
    rng, V = np.random.default_rng(0), engines.bundle.target.vocab_size
    if tokenizer is None:
        prompts = [tuple(rng.integers(0, V, 4 + i).tolist()) for i in range(len(TEXTS))]
    else:
        prompts = [tuple(tokenizer.encode(text)) for text in TEXTS]
    return [Answer(i + 1, i, Request(i, ids, SamplingParams(1, seed=i))) for i, ids in enumerate(prompts)]


def audit(
    engines: Engines, answers: list[Answer], schedules: tuple[str, ...] | None = None, effort: Effort = Effort()
) -> Iterator[Check]:
    """Checks one after the other, as they are done. `answers`: prompts (decoding.generate.read_answers). schedules
    None: all that the bundle allows. Raises ValueError for a refused prompt, ScheduleError for an unknown schedule."""
    if refused := [a.error for a in answers if a.error]:
        raise ValueError(refused[0])
    yield from sanity(engines)
    sps, missing = _sps(engines)
    asked = schedules or SCHEDULES
    makers: dict[str, Callable[[], Scheduler]] = {}
    for name in asked:
        if name in ("causal", "lagged") and sps is None:
            yield Check("schedule", name, "fail" if schedules else "warn", f"not audited: {missing}")
        elif name != "none":
            makers[name] = lambda name=name: make(name, sps=sps)
    some = answers[: effort.prompts]
    yield from _timed(greedy, engines, some, makers, effort)
    yield from _timed(coupled, engines, some, makers, effort)
    for name, maker in {"none": NoDraft, **makers}.items():
        counts = effort.samples, effort.sample_tokens, effort.sample_batch
        yield from _timed(sampled, engines, some, name, maker(), *counts)


def _timed(check: Callable[..., Iterator[Check]], *arguments) -> Iterator[Check]:
    started = perf_counter()
    for found in check(*arguments):
        found.seconds = perf_counter() - started
        yield found
        started = perf_counter()


# -- the bundle --------------------------------------------------------------------------------------------------------


def sanity(engines: Engines) -> Iterator[Check]:
    """Files and hashes were checked when the bundle was opened; here: what the load-aware schedulers need."""
    bundle = engines.bundle
    yield Check(
        "bundle", "", "ok", f"{bundle.target.name}, {bundle.dtype}, block {bundle.draft.block_size}; hashes match"
    )
    sps, missing = _sps(engines)
    yield (
        Check("SPS table", "", "ok", "taken on this machine with these engines")
        if sps
        else Check("SPS table", "", "warn", missing)
    )
    if not bundle.draft.has_confidence:
        yield Check("confidence", "", "warn", "the draft has no confidence head: every draft token counts as certain")
    elif bundle.calibration is None and bundle.confidence_temperatures is None:
        yield Check("calibration", "", "warn", "no temperatures: raw confidences are used; run make calibrate")
    else:
        spread = " ".join(f"{t:.2f}" for t in bundle.temperatures(True))
        yield Check("calibration", "", "ok", f"temperatures {spread}")


def _sps(engines: Engines) -> tuple[Sps | None, str]:
    try:
        return Sps.of(engines), ""
    except BundleError as error:
        return None, str(error)


# -- equality ----------------------------------------------------------------------------------------------------------


def greedy(engines: Engines, answers: list[Answer], makers: dict, effort: Effort) -> Iterator[Check]:
    """Every schedule, at every batch size, against the target alone, one prompt at a time."""
    greedy = [_with(a, max_tokens=effort.tokens, temperature=0.0, ignore_eos=True) for a in answers]
    yield from _equality("greedy equality", engines, greedy, makers, effort, NEAR_TIE)


def coupled(engines: Engines, answers: list[Answer], makers: dict, effort: Effort) -> Iterator[Check]:
    """The coupled accept rule: the target's own text for a seed, token for token, temperatures and filters mixed."""
    mixed = [
        dict(temperature=1.0),
        dict(temperature=0.7, top_p=0.9),
        dict(temperature=1.3, top_k=50, repetition_penalty=1.1),
    ]
    coupled = [
        _with(a, max_tokens=effort.tokens, ignore_eos=True, accept="coupled", seed=1000 + i, **mixed[i % 3])
        for i, a in enumerate(answers)
    ]
    yield from _equality("coupled equality", engines, coupled, makers, effort, 0.0)


def _equality(
    name: str, engines: Engines, answers: list[Answer], makers: dict, effort: Effort, near_tie: float
) -> Iterator[Check]:
    alone: Reference = reference(engines, answers)
    for schedule, maker in makers.items():
        runs = [difference(engines, alone, size, maker(), near_tie) for size in effort.batches]
        different = sum(run["different"] for run in runs)
        near = sum(run["near_ties"] for run in runs)
        count, sizes = len(answers) * len(runs), ", ".join(map(str, effort.batches))
        detail = f"{count - different - near} of {count} outputs equal ({alone.tokens} tokens, batches {sizes})"
        if near:
            detail += f", {near} near-ties (gap under {near_tie:g})"
        if different:
            first = next(d for run in runs for d in run["differences"] if d["gap"] >= near_tie)
            detail += (
                f"; {different} differ, prompt {first['line']} at token {first['at']} by a gap of {first['gap']:.3g}"
            )
        figures = {"outputs": count, "different": different, "near_ties": near, "runs": runs}
        yield Check(name, schedule, "fail" if different else "ok", detail, figures)


def _with(answer: Answer, **params) -> Answer:
    """A copy whose request has these parameters; its seed and prompt stay."""
    return Answer(
        answer.line,
        answer.id,
        replace(answer.request, params=SamplingParams(**{"seed": answer.request.params.seed, **params})),
    )
