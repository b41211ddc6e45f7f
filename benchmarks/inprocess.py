"""Closed-loop load on a decoding loop in this process, timed per token.

Knows: decoding's Loop. Refuses to know: servers, tables.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from decoding.loop import Loop
from decoding.request import Request, SamplingParams

from .common import Acceptance
from .steady import Plan, Window
from .timing import Run, Timing


def steady(engines, scheduler, prompts: Sequence[Sequence[int]], plan: Plan, token_budget: int = 512) -> dict:
    """One window of the load (benchmarks/steady.py) over prompts of token ids.

    Returns Window.summary() and, over the steps inside the window: host_share (of the loop's time, outside the engines),
    no_draft_share (of the requests' rounds), step_ms and split_ms (mean of a step: each engine, schedule, host = the rest).
    Raises RuntimeError when a request ends in an error.
    """
    loop = Loop(engines, scheduler, max_requests=plan.concurrency, token_budget=token_budget)
    window, busy, before = Window(plan), 0, None
    while window.closed is None:
        while busy < plan.concurrency:
            i = window.submit(time.perf_counter())
            params = SamplingParams(
                max_tokens=plan.length(i),
                temperature=plan.temperature,
                seed=plan.seed + i,
                ignore_eos=plan.ignore_eos,
            )
            loop.add(Request(i, tuple(prompts[plan.prompt(i, len(prompts))]), params))
            busy += 1
        outputs = loop.step()
        now = time.perf_counter()
        for output in outputs:
            if output.finish_reason == "error":
                raise RuntimeError(f"Request {output.request_id} failed: {output.error}")
            if window.heard(output.request_id, now, len(output.token_ids)) and (stats := output.stats) is not None:
                window.rounds(1, stats.verified, stats.accepted, undrafted=stats.drafted == 0)
            busy -= bool(output.finish_reason)
        if window.opened is not None and before is None:
            before = _clock(loop)
    steps, seconds, engines_s, host_s = (_difference(b, a) for a, b in zip(before, _clock(loop)))
    split = {name: 1e3 * s / steps for name, s in (engines_s | host_s).items()}
    host = seconds - sum(engines_s.values())
    return window.summary() | {
        "host_share": host / seconds,
        "no_draft_share": window.undrafted / window.acceptance.rounds if window.acceptance.rounds else 0.0,
        "step_ms": 1e3 * seconds / steps,
        "split_ms": split | {"host": 1e3 * (host - sum(host_s.values())) / steps},
    }


def _clock(loop: Loop) -> tuple[int, float, dict[str, float], dict[str, float]]:
    metrics = loop.metrics
    return metrics.steps, metrics.seconds, dict(metrics.engine_seconds), dict(metrics.host_seconds)


def _difference(after, before):
    if isinstance(after, dict):
        return {name: value - before.get(name, 0.0) for name, value in after.items()}
    return after - before


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
    accept: str = "rejection",
    progress=lambda done: None,
) -> Run:
    """Answers every prompt (token ids), `concurrency` at a time. Request i has the seed `seed + i`.

    Raises RuntimeError when a request ends in an error.
    """
    loop = Loop(engines, scheduler, max_requests=concurrency, token_budget=token_budget, accept=accept)
    acceptance, timings, done = Acceptance(), [], 0
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
    return Run(timings, acceptance)
