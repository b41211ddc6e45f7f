"""Past this machine: the scheduler of decoding/ on step times of GPUs that are not here.

A discrete-event simulation: arrivals, chunked prefill, draft, decision, verify step, commit. The decision is made by the
very objects that the loop uses (decoding.schedule); step times come from benchmarks/roofline.py through the same cost
table (engines.sps.Sps); what a block would have got accepted comes from recorded rounds (benchmarks/traces.py).

Knows: what a serving step does to a set of requests. Refuses to know: tokens, engines. Its results are not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import numpy as np
from decoding.schedule import RoundLoad, RoundState, Scheduler
from engines.sps import Sps
from numpy import ndarray

from .traces import Traces


@dataclass(frozen=True)
class Traffic:
    """users > 0: a closed loop (a finished request is followed by a new one); else `rate` requests a second, Poisson.

    mix: shares of the kinds; prompt and answer: mean tokens, both log-normal with sigma 0.6, cut to 16..8x the mean.
    """

    users: int = 0
    rate: float = 0.0
    mix: tuple[tuple[str, float], ...] = (("maths", 1 / 3), ("code", 1 / 3), ("chat", 1 / 3))
    prompt: float = 512.0
    answer: float = 384.0


class Active:
    """Requests that hold a slot, as arrays that grow and are compacted together."""

    FIELDS = ("pointer", "pool", "left", "context", "prefill", "arrived", "first", "begun")

    def __init__(self):
        self.data = {name: np.zeros(0, float) for name in self.FIELDS}

    def __len__(self) -> int:
        return len(self.data["left"])

    def __getattr__(self, name: str) -> ndarray:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def add(self, **columns: ndarray) -> None:
        for name in self.FIELDS:
            self.data[name] = np.concatenate([self.data[name], np.asarray(columns[name], float)])

    def keep(self, mask: ndarray) -> None:
        self.data = {name: column[mask] for name, column in self.data.items()}


def simulate(
    make_scheduler: Callable[[], Scheduler],
    sps: Sps,
    traces: Traces,
    traffic: Traffic,
    *,
    seconds: float = 20.0,
    slots: int = 1024,
    token_budget: int = 2048,
    seed: int = 0,
) -> dict:
    """Runs `seconds` of simulated time; the first third warms up and is not counted. Returns the cell's figures."""
    scheduler, rng, G = make_scheduler(), np.random.default_rng(seed), traces.confidence.shape[1]
    names = [name for name, _ in traffic.mix if name in traces.pools]
    shares = np.array([share for name, share in traffic.mix if name in traces.pools])
    pools = np.array([traces.pools[name] for name in names])
    active, clock, start = Active(), 0.0, seconds / 3
    sums = dict.fromkeys(("steps", "tokens", "rounds", "verified", "accepted", "drafted", "skipped", "requests", "busy"), 0.0)
    ttft: list[float] = []
    speeds: list[float] = []
    next_arrival = rng.exponential(1 / traffic.rate) if traffic.rate else np.inf
    waiting: list[float] = [0.0] * traffic.users

    def admit() -> None:
        count = min(len(waiting), slots - len(active))
        if count <= 0:
            return
        kind = rng.choice(len(names), count, p=shares / shares.sum())
        prompt, answer = (_lognormal(rng, mean, count) for mean in (traffic.prompt, traffic.answer))
        first, last = pools[kind].T
        active.add(
            pointer=first + np.floor(rng.random(count) * (last - first)), pool=kind, left=answer, context=np.zeros(count),
            prefill=prompt, arrived=np.array(waiting[:count]), first=np.full(count, np.nan), begun=answer,
        )  # fmt: skip
        del waiting[:count]

    while clock < seconds:
        while next_arrival <= clock:
            waiting.append(next_arrival)
            next_arrival += rng.exponential(1 / traffic.rate)
        admit()
        if not len(active):
            clock = min(next_arrival, seconds)
            continue
        a, counted = active, clock >= start
        decode = np.flatnonzero(a.prefill == 0)
        R = len(decode)
        chunks, prompt_tokens = _chunks(a.prefill, max(token_budget - R, token_budget // 8))
        context = float(a.context.mean())
        # Draft and decide, as the loop does.
        chosen, lengths, ms = decode[:0], np.zeros(0, int), 0.0
        wanted = scheduler.draft(RoundLoad(R, 0, prompt_tokens, context)) if R and scheduler.drafts else 0
        if wanted:
            chosen = np.sort(rng.choice(decode, wanted, replace=False)) if wanted < R else decode
            rows = a.pointer[chosen].astype(int)
            ms += sps.draft_ms(len(chosen), context)
            state = RoundState(
                confidence=traces.confidence[rows], threshold=np.full(len(chosen), np.nan), context=context,
                plain=R - len(chosen), prefill=prompt_tokens,
            )  # fmt: skip
            lengths = np.asarray(scheduler.lengths(state))
        total = R + int(lengths.sum()) + prompt_tokens
        ms += float(sps.target_ms(len(active), np.array([total]), context)[0])
        clock += ms / 1e3
        # Commit.
        new = np.zeros(len(a))
        new[decode] = 1
        if wanted:
            accepted = np.minimum(traces.accepted[rows], lengths)
            new[chosen] += accepted
            scheduler.observe(lengths, accepted)
            first, last = pools[a.pool[chosen].astype(int)].T
            a.pointer[chosen] = np.where(a.pointer[chosen] + 1 >= last, first, a.pointer[chosen] + 1)
        a.prefill[:] -= chunks
        done_prefill = (chunks > 0) & (a.prefill == 0)
        new[done_prefill] = 1
        a.context[:] += chunks + np.where(done_prefill, 0, new)
        a.first[done_prefill] = clock
        emitted = np.minimum(new, a.left)
        a.left[:] -= emitted
        if counted:
            sums["steps"] += 1
            sums["busy"] += ms / 1e3
            sums["tokens"] += emitted.sum()
            sums["rounds"] += R
            sums["skipped"] += R - len(chosen) if scheduler.drafts else 0
            if wanted:
                sums["drafted"] += len(chosen)
                sums["verified"] += lengths.sum()
                sums["accepted"] += accepted.sum()
        finished = a.left <= 0
        if finished.any():
            for i in np.flatnonzero(finished):
                if counted and a.arrived[i] >= 0 and clock > a.first[i]:
                    speeds.append((a.begun[i] - 1) / (clock - a.first[i]))
                    ttft.append(a.first[i] - a.arrived[i])
                sums["requests"] += counted
            if traffic.users:
                waiting += [clock] * int(finished.sum())
            active.keep(~finished)
    return _cell(sums, ttft, speeds, clock - start, len(waiting), len(active))


def _cell(sums: dict, ttft: list, speeds: list, seconds: float, waiting: int, active: int) -> dict:
    share = lambda a, b: float(a / b) if b else 0.0
    quantile = lambda values, q: float(np.quantile(values, q)) if values else float("nan")
    return {
        "total_tok_s": share(sums["tokens"], seconds),
        "user_tok_s": quantile(speeds, 0.5),
        "ttft_ms": 1e3 * quantile(ttft, 0.5),
        "ttft_p95_ms": 1e3 * quantile(ttft, 0.95),
        "step_ms": 1e3 * share(sums["busy"], sums["steps"]),
        "acceptance_length": 1 + share(sums["accepted"], sums["rounds"]),
        "verified_per_round": share(sums["verified"], sums["rounds"]),
        "rejected_share": 1 - share(sums["accepted"], sums["verified"]) if sums["verified"] else 0.0,
        "skipped_share": share(sums["skipped"], sums["rounds"]),
        "requests": int(sums["requests"]),
        "waiting": waiting,
        "active": active,
    }


def _chunks(prefill: ndarray, budget: int) -> tuple[ndarray, int]:
    """Prompt tokens fed to each request in this step, first come first served, `budget` in all."""
    before = np.cumsum(prefill) - prefill
    chunks = np.clip(budget - before, 0, prefill)
    return chunks, int(chunks.sum())


def _lognormal(rng: np.random.Generator, mean: float, count: int, sigma: float = 0.6) -> ndarray:
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.round(drawn), 16, 8 * mean)
