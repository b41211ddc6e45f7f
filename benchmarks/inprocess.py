"""Closed-loop load on a decoding loop in this process: a fixed number of requests in flight, timed per token.

Knows: decoding.Loop, the times of a request. Refuses to know: servers, tables.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from decoding.loop import Loop
from decoding.request import Request, SamplingParams

from .common import Acceptance, median


@dataclass
class Timing:
    """One request: when it was submitted, when each response came (seconds of one clock), and its tokens."""

    submitted: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (time, tokens in that response)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, now: float, tokens: Sequence[int]) -> None:
        if len(tokens):
            self.arrivals.append((now, len(tokens)))
            self.tokens.extend(int(t) for t in tokens)

    @property
    def first_token(self) -> float:
        """Time to first token, s."""
        return self.arrivals[0][0] - self.submitted

    @property
    def inter_token(self) -> float | None:
        """Mean seconds a token after the first response's; None for a request that got one response."""
        later = sum(n for _, n in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None


@dataclass
class Run:
    """What one run of a load gave."""

    seconds: float
    timings: list[Timing]
    acceptance: Acceptance
    outside_engines: float | None = None  # share of the rounds' time, in process only
    engine_seconds: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict:
        """Output tok/s in all and per user, TTFT and ITL medians (ms), acceptance."""
        per_token = [t.inter_token for t in self.timings if t.inter_token]
        tokens = sum(len(t.tokens) for t in self.timings)
        body = {
            "requests": len(self.timings),
            "output_tokens": tokens,
            "seconds": self.seconds,
            "output_tok_s": tokens / self.seconds,
            "user_tok_s": 1 / median(per_token) if per_token else float("nan"),
            "ttft_ms": 1e3 * median(t.first_token for t in self.timings),
            "itl_ms": 1e3 * median(per_token),
            "acceptance_length": self.acceptance.length,
            "verified_per_round": self.acceptance.verified / max(1, self.acceptance.rounds),
        }
        if self.outside_engines is not None:
            body["outside_engines"] = self.outside_engines
        return body


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
