"""The audit of a bundle: does any schedule change what the target says? For users with their own models.

Knows: greedy equality with near-tie accounting, coupled equality, a test of sampled tokens against the target's own
probabilities, what a bundle must hold. Refuses to know: how a schedule decides.

Sampled tokens are tested without an enumeration: a token x drawn after a prefix gives u = P(tokens more probable than
x) + v P(x) with v uniform, and when every x has the target's distribution given its prefix, all u are independent
uniforms on [0, 1).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Callable, Iterator

import numpy as np
from numpy import ndarray

from engines import BundleError, Engines
from engines.pack import pack_target
from engines.sps import Sps

from .chat import ChatTokenizer
from .compare import Reference, difference, reference
from .generate import Answer, decode_all
from .loop import Loop
from .request import Request, SamplingParams
from .schedule import SCHEDULES, NoDraft, Scheduler, make

TEXTS = (
    "Write three sentences about the sea.", "What is 17 * 23? Think step by step.", "def fibonacci(n):",
    "Explain to a child why the sky is blue.", "List five uses for a brick:", "The capital of France is",
    "Write a Python function that reverses a string.", "Tom has 12 apples and gives a third away. How many are left?",
    "Translate to French: good morning, my friend.", "Once upon a time, in a small village,",
    "Give me a recipe for a quick soup.", "SELECT name, COUNT(*) FROM orders WHERE",
)  # fmt: skip
BINS = 20
P_BOUND = 1e-5  # least p-value of a test of sampled tokens: a sound bundle fails an audit with a chance of 1e-4
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


@dataclass
class Check:
    """One line of the audit. status: "ok" | "warn" (nothing wrong, something missing) | "fail"."""

    name: str
    schedule: str
    status: str
    detail: str
    figures: dict = field(default_factory=dict)
    seconds: float = 0.0


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
        yield from _timed(sampled, engines, some, {name: maker}, effort)


def _timed(check: Callable[..., Iterator[Check]], *arguments) -> Iterator[Check]:
    started = perf_counter()
    for found in check(*arguments):
        found.seconds = perf_counter() - started
        yield found
        started = perf_counter()


# -- the bundle
# ----------------------------------------------------------------------------------------------------------


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


# -- equality
# ------------------------------------------------------------------------------------------------------------


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


# -- distribution
# --------------------------------------------------------------------------------------------------------


def sampled(engines: Engines, answers: list[Answer], makers: dict, effort: Effort) -> Iterator[Check]:
    """Tokens drawn at temperature 1 against the target's probabilities after the very prefix each was drawn after."""
    prompts = [a.request.prompt_ids[-24:] for a in answers[:4]]
    for schedule, maker in makers.items():
        loop = Loop(engines, maker(), max_requests=effort.sample_batch, accept="rejection")
        params = SamplingParams(effort.sample_tokens, 1.0, ignore_eos=True)
        drawn = [
            Answer(
                i,
                i,
                replace(answers[0].request, id=i, prompt_ids=prompts[i % len(prompts)], params=replace(params, seed=i)),
            )
            for i in range(effort.samples)
        ]
        decode_all(loop, drawn)
        if failed := [a.error for a in drawn if a.error]:
            yield Check("sampled tokens", schedule, "fail", failed[0])
            continue
        ranks, chances, expected = [], [], []
        for start, prompt in enumerate(prompts):
            outputs = [a.output_ids for a in drawn[start :: len(prompts)]]
            for probabilities, token in _scored(engines, prompt, outputs, effort.sample_batch):
                own = probabilities[token]
                ranks.append((probabilities[probabilities > own].sum(), own))
                chances.append(np.log(max(own, 1e-30)))
                logs = np.log(np.maximum(probabilities, 1e-30))
                mean = (probabilities * logs).sum()
                expected.append(
                    (mean, (probabilities * logs**2).sum() - mean**2, probabilities.max(), own == probabilities.max())
                )
        yield _verdict(schedule, np.array(ranks), np.array(chances), np.array(expected), loop)


def _verdict(schedule: str, ranks: ndarray, chances: ndarray, expected: ndarray, loop: Loop) -> Check:
    rng = np.random.default_rng(0)
    u = ranks[:, 0] + rng.random(len(ranks)) * ranks[:, 1]
    spread = chi_square(
        np.bincount((u * BINS).astype(int).clip(0, BINS - 1), minlength=BINS), np.full(BINS, len(u) / BINS)
    )
    z = (chances - expected[:, 0]).sum() / math.sqrt(max(expected[:, 1].sum(), 1e-12))
    surprise = math.erfc(abs(z) / math.sqrt(2))
    top, want = float(expected[:, 3].mean()), float(expected[:, 2].mean())
    least = min(spread, surprise)
    figures = {
        "tokens": len(u), "p_spread": spread, "p_surprise": surprise, "z_surprise": z, "top_share": top,
        "top_expected": want,
        "acceptance_length": loop.metrics.acceptance_length, "verified": loop.metrics.verified_tokens,
    }  # fmt: skip
    detail = f"{len(u)} tokens; the likeliest drawn {top:.1%} (target {want:.1%}); least p {least:.2g}"
    if schedule != "none":
        detail += f"; acceptance length {loop.metrics.acceptance_length:.2f}"
    return Check("sampled tokens", schedule, "ok" if least > P_BOUND else "fail", detail, figures)


def _scored(
    engines: Engines, prompt: tuple[int, ...], outputs: list[list[int]], rows: int
) -> Iterator[tuple[ndarray, int]]:
    """(the target's probabilities [V] float64, the token drawn) for every token of `outputs`, by plain passes."""
    prompt = list(prompt)
    for start in range(0, len(outputs), rows):
        group = outputs[start : start + rows]
        R, longest = len(group), max(map(len, group))
        engines.ensure_capacity(R, len(prompt) + longest)
        if start == 0 and len(prompt) > 1:  # later groups find the prompt in their rows
            _pass(engines, [prompt[:-1]] * R, np.zeros(R, np.int64), np.ones(R, np.int64))
        fed = [[prompt[-1], *output[:-1]] for output in group]
        counts = np.array([len(f) for f in fed], np.int64)
        logits = _pass(engines, fed, np.full(R, len(prompt) - 1, np.int64), counts)
        tokens = [token for output in group for token in output]
        for row, token in zip(logits, tokens):
            p = np.exp(row.astype(np.float64) - row.max())
            yield p / p.sum(), token


def _pass(engines: Engines, tokens: list[list[int]], lengths: ndarray, wanted: ndarray) -> ndarray:
    batch, _, _ = pack_target(tokens, lengths, wanted, engines.target_capacity, engines.bundle.max_context)
    return engines.target(batch).logits


def chi_square(observed: ndarray, expected: ndarray) -> float:
    """p-value of counts against expected counts. Wilson and Hilferty: (chi / degrees)^(1/3) is close to normal."""
    degrees = len(expected) - 1
    chi = ((observed - expected) ** 2 / expected).sum()
    z = ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


def summary(checks: list[Check]) -> tuple[bool, str]:
    """(no check failed, one sentence)."""
    failed = [c for c in checks if c.status == "fail"]
    audited = list(dict.fromkeys(c.schedule for c in checks if c.name == "sampled tokens" and c.schedule != "none"))
    if failed:
        what = ", ".join(dict.fromkeys(f"{c.name} {c.schedule}".strip() for c in failed))
        return False, f"NOT LOSSLESS OR NOT AUDITED: {what}."
    warned = [f"{c.name} {c.schedule}".strip() for c in checks if c.status == "warn"]
    names = ", ".join(audited) or "no schedule"
    text = f"Lossless: {names} give the target's greedy text, its seeded text and its distribution."
    return True, text + (f" Mind: {', '.join(warned)}." if warned else "")


def as_json(checks: list[Check]) -> dict:
    ok, sentence = summary(checks)
    return {"ok": ok, "verdict": sentence, "checks": [asdict(c) for c in checks]}


_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def show(check: Check) -> None:
    """One line on stdout as the check ends."""
    from rich.console import Console

    status = f"[{_COLOURS[check.status]}]{check.status:4}[/]"
    line = f"{status} {check.name:16} {check.schedule:10} {check.seconds:5.1f} s  "
    Console(soft_wrap=True, highlight=False).print(line, end="")
    Console(soft_wrap=True, highlight=False, markup=False).print(check.detail)
