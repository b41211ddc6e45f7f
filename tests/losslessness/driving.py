"""Drivers and schedulers of the kit: requests that join and leave, schedulers made as a user makes them.

Wall-clock time is kept out of the schedulers' decisions, so that fixed seeds give fixed results.
"""

from __future__ import annotations

from typing import Collection, Hashable

import numpy as np

from decoding.loop import Loop
from decoding.request import Request
from decoding.schedule import SCHEDULES as _ALL
from decoding.schedule import Scheduler
from decoding.schedule import make as make_shipped
from engines.sps import Sps

SCHEDULES = tuple(_ALL)
DRAFTING = tuple(name for name in SCHEDULES if name != "none")


def jagged_sps(G: int, draft_ms: float = 0.05) -> Sps:
    """A cost curve of steps and cliffs: tokens beyond the requests are nearly free up to a multiple of 4 (of 3 for many
    requests), then a cliff comes; at some numbers of requests nothing pays, so that drafts are skipped and probed. Padded
    slots cost a third of a token."""
    target, draft, padding = [], [], []
    for R in (1, 2, 3, 5, 8, 64):
        tile = 4 if R < 8 else 3 * R // 4 + 1
        dear = 1.6 if R == 3 else 0.35
        for context in (0, 64):
            for n in range(R, R * (G + 1) + 1):
                ms = 1.0 + 0.01 * n + dear * ((n - 1) // tile - (R - 1) // tile) + 0.002 * context
                target.append((R, n, context, ms))
            draft.append((R, context, draft_ms * (1 + R / 8)))
            padding.append((R, R * (G + 1), 2 * R * (G + 1), context, ms + 0.003 * R * (G + 1)))
    return Sps.from_points(target, draft, padding=padding)


def make(name: str, sps: Sps | None = None, G: int = 4) -> Scheduler:
    """A shipped scheduler; the load-aware ones on `sps` (None: the jagged table)."""
    scheduler = make_shipped(name, sps=sps or jagged_sps(G))
    scheduler.timed = lambda *times: None
    return scheduler


def run(loop: Loop, requests: list[Request], cancel: Collection[Hashable] = (), burst: int | None = None) -> dict:
    """{id: token ids}. Requests join in bursts of a random size while others decode and leave; those of `cancel` are
    cancelled in the step that gives their first tokens. An engine's error fails the test."""
    rng, waiting, got = np.random.default_rng(len(requests)), list(reversed(requests)), {}
    most = burst or loop.max_requests
    while waiting or loop.has_work:
        if waiting and loop.waiting < loop.max_requests:
            for _ in range(min(len(waiting), int(rng.integers(0, most + 2)))):
                request = waiting.pop()
                got[request.id] = []
                loop.add(request)
        for output in loop.step():
            assert output.finish_reason != "error", output.error
            got[output.request_id] += output.token_ids
            if output.request_id in cancel and output.finish_reason is None:
                loop.cancel(output.request_id)
    return got
