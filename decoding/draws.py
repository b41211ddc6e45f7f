"""Tokens drawn under a schedule, tested against the target's own probabilities.

Knows: the target's passes over a drawn text, the statistics. Refuses to know: how a schedule decides, other checks.

There is no enumeration: a token x drawn after a prefix gives u = P(tokens more probable than x) + v P(x) with v
uniform, and when every x has the target's distribution given its prefix, all u are independent uniforms on [0, 1).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Iterator

import numpy as np
from numpy import ndarray

from engines import Engines
from engines.arrays import to_host
from engines.pack import pack_target

from .checks import Check
from .generate import Answer, decode_all
from .loop import Loop
from .request import SamplingParams
from .schedule import Scheduler

BINS = 20
P_BOUND = 1e-5  # least p-value of a test of sampled tokens: a sound bundle fails an audit with a chance of 1e-4


def sampled(
    engines: Engines, answers: list[Answer], schedule: str, scheduler: Scheduler, samples: int, tokens: int, batch: int
) -> Iterator[Check]:
    """`samples` requests of `tokens` tokens each at temperature 1, `batch` at once, against the target's probabilities
    after the very prefix that each token was drawn after. Yields one Check."""
    prompts = [a.request.prompt_ids[-24:] for a in answers[:4]]
    loop = Loop(engines, scheduler, max_requests=batch, accept="rejection")
    params = SamplingParams(tokens, 1.0, ignore_eos=True)
    drawn = [
        Answer(
            i,
            i,
            replace(answers[0].request, id=i, prompt_ids=prompts[i % len(prompts)], params=replace(params, seed=i)),
        )
        for i in range(samples)
    ]
    decode_all(loop, drawn)
    if failed := [a.error for a in drawn if a.error]:
        yield Check("sampled tokens", schedule, "fail", failed[0])
        return
    ranks, chances, expected = [], [], []
    for start, prompt in enumerate(prompts):
        outputs = [a.output_ids for a in drawn[start :: len(prompts)]]
        for probabilities, token in _scored(engines, prompt, outputs, batch):
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
    return to_host(engines.target(batch).logits)


def chi_square(observed: ndarray, expected: ndarray) -> float:
    """p-value of counts against expected counts. Wilson and Hilferty: (chi / degrees)^(1/3) is close to normal."""
    degrees = len(expected) - 1
    chi = ((observed - expected) ** 2 / expected).sum()
    z = ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))
