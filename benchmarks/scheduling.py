"""What scheduling costs the host: the time of one decision by number of requests, and the host's share of a round.

Knows: the scheduler's protocol (decoding/schedule.py). Refuses to know: how a decision is made.

A decision is everything that a scheduler does for one step: draft, lengths, observe, timed; fresh confidences each time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from decoding.schedule import SCHEDULES, RoundLoad, RoundState, for_engines, make
from engines import BundleError
from engines.sps import Sps

from . import bundle as bundles
from .cells import MODES
from .common import KINDS, console_for_tables, encode, median, read_items, rich_table, write_result
from .steady import Plan

G, BOUND_US = 7, 300.0
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WINDOW = {1: 300, 16: 800}  # requests -> output tokens of a window
DECISIONS = (
    ("scheduler", lambda r: r["scheduler"]),
    ("requests", lambda r: str(r["requests"])),
    ("median us", lambda r: f"{r['median_us']:.1f}"),
    ("99% us", lambda r: f"{r['p99_us']:.1f}"),
)
HOST = (
    ("scheduler", lambda r: r["mode"]),
    ("requests", lambda r: str(r["requests"])),
    ("round ms", lambda r: f"{r['step_ms']:.2f}"),
    ("host ms", lambda r: f"{r['host_ms']:.3f}"),
    ("host %", lambda r: f"{100 * r['host_share']:.1f}"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def table(most: int = 256) -> Sps:
    """A made-up jagged table of a machine on which drafting pays at every load, so that every decision is a full one: a
    high floor, a small slope, a step at every 32 tokens, attention growing with the context, padded slots not free."""
    requests = sorted({1, 4, 16, 64, most})
    ms = lambda r, n, c: 10.0 + 0.002 * n + 0.06 * np.ceil(n / 32) + 1e-7 * n * c
    target = [(r, r * (1 + k), c, float(ms(r, r * (1 + k), c))) for r in requests for k in range(G + 1) for c in (64, 1024)]
    draft = [(r, c, 1.0 + 0.002 * r) for r in requests for c in (64, 1024)]
    padding = [(r, r + G, r * (1 + G), c, float(ms(r, r + G, c)) + 2e-4 * (r - 1) * G) for r, c, _ in draft if r > 1]
    return Sps.from_points(target, draft, padding=padding)


def decisions(name: str, requests: int, *, count: int = 1000, seed: int = 0) -> dict:
    """{scheduler, requests, median_us, p99_us} over `count` decisions after as many warm-up ones as a tenth of that."""
    rng, scheduler = np.random.default_rng(seed), make(name, sps=table())
    load = RoundLoad(requests=requests, context=400.0)
    taken, sps = [], table()
    for i in range(count + count // 10):
        confidence = rng.beta(3.0, 1.5, (requests, G)).astype(np.float32)
        chance = np.cumprod(rng.random((requests, G)) < confidence, axis=1)
        state = RoundState(confidence, np.full(requests, np.nan), load.context)
        started = time.perf_counter()
        verified = None
        if scheduler.draft(load) == requests:  # a probe or a skipped round is cheaper: not what is asked
            verified = scheduler.lengths(state)
        spent = time.perf_counter() - started
        if verified is None:
            continue
        accepted = (chance * (np.arange(G) < verified[:, None])).sum(axis=1)
        tokens, slots = requests + int(verified.sum()), requests * (1 + int(verified.max()))
        ms = float(sps.target_ms(requests, tokens, load.context)) + (slots - tokens) * sps.slot_ms(requests, load.context)
        took = sps.draft_ms(requests, load.context), ms
        started = time.perf_counter()
        scheduler.observe(verified, accepted)
        scheduler.timed(*took)
        spent += time.perf_counter() - started
        if i >= count // 10:
            taken.append(1e6 * spent)
    if not taken:
        raise RuntimeError(f"{name} made no draft for {requests} requests; its decisions were not measured.")
    p50, p99 = np.percentile(taken, (50, 99))
    return {"scheduler": name, "requests": requests, "median_us": round(float(p50), 2), "p99_us": round(float(p99), 2)}


def host(
    opened, prompts: Sequence[Sequence[int]], modes: Sequence[str], requests: int, tokens: int, repeats: int
) -> list[dict]:
    """A row a mode: medians over interleaved windows of the round's time and of what the engines leave of it."""
    from .inprocess import Lane, together

    schedulers = {mode: for_engines(opened, mode) for mode in modes}
    found: dict[str, list[dict]] = {mode: [] for mode in modes}
    for r in range(repeats + 1):
        for mode, scheduler in schedulers.items():
            plan = Plan(requests, tokens if r else max(1, tokens // 4), first=r * len(prompts) // (repeats + 1))
            (window,) = together([Lane(opened, scheduler, prompts, plan)])
            if r:  # the first is the warm-up
                found[mode].append(window)
    return [
        {
            "mode": mode,
            "requests": requests,
            "step_ms": round(median(w["step_ms"] for w in windows), 4),
            "host_ms": round(median(w["host_share"] * w["step_ms"] for w in windows), 4),
            "host_share": round(median(w["host_share"] for w in windows), 5),
        }
        for mode, windows in found.items()
    ]


@app.command()
def main(
    target: bundles.TargetOption = bundles.TARGET,
    draft: bundles.DraftOption = bundles.DRAFT,
    bundle: bundles.BundleOption = bundles.BUNDLE,
    dtype: bundles.DtypeOption = "int8",
    count: Annotated[int, typer.Option(help="decisions of each kind")] = 1000,
    repeats: Annotated[int, typer.Option(help="windows of each mode for the host's share; 0 = leave it out")] = 3,
    kind: Annotated[str, typer.Option(help="prompts of the host's share")] = "maths",
    out: Path = Path("build/scheduling.json"),
) -> None:
    """Times decisions on a made-up table, then rounds on the bundle."""
    console, modes = console_for_tables(), [m for m in MODES if m in SCHEDULES]
    drafting = [m for m in modes if m != "none"]
    made = [decisions(name, requests, count=count) for name in drafting for requests in REQUESTS]
    console.print(rich_table(f"One decision, {G} slots", DECISIONS, made))
    result, rows = {"block_size": G, "bound_us": BOUND_US, "decisions": made}, []
    if repeats:
        manifest = bundles.ensure(target, draft, bundle, dtype)
        bundles.ensure_profile(bundle)
        try:
            import engines

            opened = engines.load(bundle)
            prompts = encode(bundle, read_items(KINDS[kind]))
            for requests, tokens in WINDOW.items():
                rows += host(opened, prompts, modes, requests, tokens, repeats)
        except BundleError as error:
            bundles.fail(str(error))
        result |= {"target": manifest["target"]["name"], "dtype": dtype, "kind": kind, "host": rows}
        console.print(rich_table("Host work of a round", HOST, rows))
    write_result(out, result)
    console.print(f"written: {out}", soft_wrap=True)


if __name__ == "__main__":
    app()
