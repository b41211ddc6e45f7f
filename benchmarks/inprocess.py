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


class Lane:
    """One mode under the load of benchmarks/steady.py, over prompts of token ids. Its clock stands still between its
    turns: several lanes, each on engines of its own, can share a machine in short turns and see the same slow moments.

    Raises RuntimeError when a request ends in an error.
    """

    def __init__(self, engines, scheduler, prompts: Sequence[Sequence[int]], plan: Plan, token_budget: int = 512):
        self.loop = Loop(engines, scheduler, max_requests=plan.concurrency, token_budget=token_budget)
        self.plan, self.prompts, self.window = plan, prompts, Window(plan)
        self._busy, self._before = 0, None
        self.rates: list[float] = []  # tokens a second of each turn inside the window
        self._rested, self._stopped = 0.0, time.perf_counter()

    @property
    def over(self) -> bool:
        return self.window.closed is not None

    def turn(self, tokens: int | None = None, *, seconds: float | None = None) -> None:
        """Steps until the window is open (nothing given), until `tokens` more have come in it, or for `seconds`; never
        past its end."""
        if seconds is not None:
            tokens = self.plan.tokens
        self._rested += time.perf_counter() - self._stopped
        goal = None if tokens is None else self.window.tokens + tokens
        started, had = time.perf_counter(), self.window.tokens
        while not self.over and (self.window.opened is None if goal is None else self.window.tokens < goal):
            self._step()
            if seconds is not None and time.perf_counter() - started >= seconds:
                break
        self._stopped = time.perf_counter()
        if tokens is not None:
            self.rates.append((self.window.tokens - had) / (self._stopped - started))

    def _now(self) -> float:
        return time.perf_counter() - self._rested

    def _step(self) -> None:
        window, plan = self.window, self.plan
        while self._busy < plan.concurrency:
            i = window.submit(self._now())
            params = SamplingParams(
                max_tokens=plan.length(i),
                temperature=plan.temperature,
                seed=plan.seed + i,
                ignore_eos=plan.ignore_eos,
            )
            self.loop.add(Request(i, tuple(self.prompts[plan.prompt(i, len(self.prompts))]), params))
            self._busy += 1
        outputs = self.loop.step()
        now = self._now()
        for output in outputs:
            if output.finish_reason == "error":
                raise RuntimeError(f"Request {output.request_id} failed: {output.error}")
            if window.heard(output.request_id, now, len(output.token_ids)) and (stats := output.stats) is not None:
                window.rounds(1, stats.verified, stats.accepted, undrafted=stats.drafted == 0)
            self._busy -= bool(output.finish_reason)
        if window.opened is not None and self._before is None:
            self._before = _clock(self.loop)

    def summary(self) -> dict:
        """Window.summary() and, over the steps inside the window: host_share (of the loop's time, outside the engines),
        no_draft_share (of the requests' rounds), step_ms and split_ms (mean of a step: each engine, schedule, host = the
        rest), turns (tokens a second of each)."""
        window = self.window
        steps, seconds, engines_s, host_s = (_difference(b, a) for a, b in zip(self._before, _clock(self.loop)))
        split = {name: 1e3 * s / steps for name, s in (engines_s | host_s).items()}
        host = seconds - sum(engines_s.values())
        return window.summary() | {
            "host_share": host / seconds,
            "no_draft_share": window.undrafted / window.acceptance.rounds if window.acceptance.rounds else 0.0,
            "step_ms": 1e3 * seconds / steps,
            "turns": self.rates,
            "split_ms": split | {"host": 1e3 * (host - sum(host_s.values())) / steps},
        }


def together(lanes: Sequence[Lane], turns: int = 16) -> list[dict]:
    """The lanes' windows, each cut into so many turns that go round (there and back): summaries in the lanes' order."""
    for lane in lanes:
        lane.turn()
    order = list(lanes)
    while order := [lane for lane in reversed(order) if not lane.over]:
        for lane in order:
            lane.turn(max(1, lane.plan.tokens // turns))
    return [lane.summary() for lane in lanes]


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
