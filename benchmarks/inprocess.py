"""Closed-loop load on a decoding loop in this process: a fixed number of requests in flight, timed per token.

Knows: decoding's Loop. Refuses to know: servers, tables.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from decoding.loop import Loop
from decoding.request import Request, SamplingParams

from .common import Acceptance
from .timing import Run, Timing


def run(
    engines,
    scheduler,
    prompts: Sequence[Sequence[int]],
    *,
    concurrency: int,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    token_budget: int = 512,
    progress=lambda done: None,
) -> Run:
    """Answers every prompt (token ids), `concurrency` at a time. Request i has the seed `seed + i`.

    Raises RuntimeError when a request ends in an error.
    """
    loop = Loop(engines, scheduler, max_requests=concurrency, token_budget=token_budget)
    acceptance, timings, done = Acceptance(), [], 0
    started = time.perf_counter()
    while done < len(prompts):
        while len(timings) < len(prompts) and len(timings) - done < concurrency:
            i = len(timings)
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed + i)
            timings.append(Timing(time.perf_counter()))
            loop.add(Request(i, tuple(prompts[i]), params))
        outputs = loop.step()
        now = time.perf_counter()
        for output in outputs:
            if output.finish_reason == "error":
                raise RuntimeError(f"Request {output.request_id} failed: {output.error}")
            timing = timings[output.request_id]
            timing.add(now, output.token_ids)
            if output.stats is not None:
                acceptance.add(output.stats.drafted, output.stats.verified, output.stats.accepted)
            if output.finish_reason:
                timing.finish_reason = output.finish_reason
                done += 1
                progress(done)
    metrics = loop.metrics
    inside = sum(metrics.engine_seconds.values())
    return Run(
        time.perf_counter() - started,
        timings,
        acceptance,
        outside_engines=1 - inside / metrics.seconds,
        engine_seconds={name: round(float(np.float64(s)), 4) for name, s in metrics.engine_seconds.items()},
    )
