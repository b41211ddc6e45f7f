"""Small drivers for loop tests."""

from __future__ import annotations

import numpy as np

from decoding.loop import Loop
from decoding.request import Request, SamplingParams


def prompts(count, vocab=60, seed=0, low=1, high=30):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, vocab, rng.integers(low, high)).tolist()) for _ in range(count)]


def requests(texts, **params):
    """One request a prompt, id = its number; `seed` counts up from the given one."""
    params = {"max_tokens": 16, "ignore_eos": True, **params}
    seed = params.pop("seed", 0)
    return [Request(i, text, SamplingParams(seed=seed + i, **params)) for i, text in enumerate(texts)]


def drive(loop: Loop, todo, join=None):
    """Decodes `todo`; `join(step)` may return requests that come later. Returns {id: outputs}."""
    outputs, step = {}, 0
    for request in todo:
        loop.add(request)
    while loop.has_work:
        for output in loop.step():
            outputs.setdefault(output.request_id, []).append(output)
        step += 1
        for request in join(step) if join else ():
            loop.add(request)
    return outputs


def tokens(outputs):
    return {i: [t for o in each for t in o.token_ids] for i, each in outputs.items()}
