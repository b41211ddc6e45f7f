"""What the target alone would say: exact probabilities of whole outputs by enumeration, and the tests that samples must
pass.

Knows: the order of a request's parameters (docs of decoding/sampling.py), here once more in float64 and in a few plain
lines. Refuses to know: drafts, schedules, engines.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Callable, Iterable

import numpy as np
from numpy import ndarray

BOUND = 1e-6  # least p-value: about 300 tests, so a sound build fails one of them with a chance of 3e-4; the seeds are
# fixed, so a pass stays a pass. A mutation must fall below it.


def next_probabilities(
    logits: ndarray, params, prompt: tuple[int, ...], output: tuple[int, ...], eos: tuple[int, ...]
) -> ndarray:
    """[V] probabilities of the next token. logits [V]: the target's own after prompt + output. Edits in the documented
    order: repetition, presence and frequency, bias, bans, temperature, top_k, top_p, min_p (ties kept by value)."""
    x = logits.astype(np.float64).copy()
    seen = np.array(sorted({*prompt, *output}), int)
    x[seen] = np.where(x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty)
    for token, count in Counter(output).items():
        x[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias:
        x[token] += bias
    for word in params.bad_words:
        *start, last = word
        if tuple(start) == ((*prompt, *output)[-len(start) :] if start else ()):
            x[last] = -np.inf
    if len(output) < params.min_tokens:
        x[list(eos)] = -np.inf
    if params.temperature == 0:
        return (np.arange(len(x)) == x.argmax()).astype(float)
    p = softmax(x / params.temperature)
    if params.top_k:
        p = np.where(p >= np.sort(p)[-params.top_k], p, 0)
        p /= p.sum()
    if params.top_p < 1:
        above = np.array([p[p > each].sum() for each in p])
        p = np.where(above < params.top_p, p, 0)
    p = np.where(p >= params.min_p * p.max(), p, 0)
    return p / p.sum()


def softmax(x: ndarray) -> ndarray:
    """Over the last axis, float64."""
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def outputs(
    logits: Callable[[tuple[int, ...]], ndarray], request, eos: tuple[int, ...]
) -> dict[tuple[int, ...], float]:
    """{output: probability} of every output that `request` may get; logits(ids) -> [V] of the token after ids."""
    p, prompt = request.params, tuple(request.prompt_ids)
    done, open_ = {}, {(): 1.0}
    for length in range(p.max_tokens):
        grown = {}
        for output, chance in open_.items():
            for token, q in enumerate(next_probabilities(logits((*prompt, *output)), p, prompt, output, eos)):
                if q > 0:
                    ended = length + 1 == p.max_tokens or (token in eos and not p.ignore_eos)
                    (done if ended else grown)[(*output, token)] = chance * q
        open_ = grown
    return done


def p_value(observed: ndarray, expected: ndarray) -> float:
    """Chi-square of counts against expected counts (cells under 5 expected are pooled); 0.0 where something impossible
    was seen. Wilson and Hilferty: (chi / degrees)^(1/3) is close to normal."""
    if observed[expected == 0].sum() > 0:
        return 0.0
    rare = expected < 5
    pooled = expected[rare].sum()
    observed, expected = np.append(observed[~rare], observed[rare].sum()), np.append(expected[~rare], pooled)
    if pooled < 5:  # too little for a cell of its own: joins the smallest one
        smallest = expected[:-1].argmin() if len(expected) > 1 else 0
        observed[smallest] += observed[-1]
        expected[smallest] += pooled
        observed, expected = observed[:-1], expected[:-1]
    degrees = len(expected) - 1
    if degrees < 1:
        return 1.0
    chi = ((observed - expected) ** 2 / expected).sum()
    z = ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


def p_values(drawn: Iterable[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> list[float]:
    """Of the outputs as a whole, of every prefix length, and of every position's token alone (-1 = ended before it)."""
    drawn = list(drawn)
    longest = max(len(o) for o in exact)
    views = [lambda o: o]
    views += [lambda o, n=n: o[:n] for n in range(1, longest)]
    views += [lambda o, k=k: o[k] if k < len(o) else -1 for k in range(1, longest)]
    return [p_value(*_counts(map(view, drawn), exact, view, len(drawn))) for view in views]


def _counts(seen: Iterable, exact: dict, view: Callable, samples: int) -> tuple[ndarray, ndarray]:
    cells: dict = {}
    for output, chance in exact.items():
        cells[view(output)] = cells.get(view(output), 0.0) + chance
    counts = Counter(seen)
    keys = [*cells, *(k for k in counts if k not in cells)]
    return np.array([counts[k] for k in keys], float), np.array([cells.get(k, 0.0) for k in keys]) * samples
