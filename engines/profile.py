"""The SPS profile: what a step costs on this machine, over requests, packed tokens and context, from real engine calls.

Knows: batches of random tokens, how to time them fairly (shuffled rounds over all points). Refuses to know: requests,
schedulers, how a table is used.

Legend: R requests, N packed tokens of a step, C context (cached tokens of each request), G block size, Q slots of a request.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from time import perf_counter
from typing import Any

import numpy as np

from .base import ConfidenceBatch, Engines, MarkovBatch, VerifyBatch
from .bundle import BundleError, update_manifest
from .caches import PATIENCE
from .pack import draws_after, pack_draft, pack_target
from .sps import hardware

REQUESTS, CONTEXTS = (1, 2, 4, 8, 16, 32), (128, 512, 1024)
QUICK_REQUESTS, QUICK_CONTEXTS = (1, 4, 16), (128, 512)
PREFILL = (32, 64, 128, 256, 512)  # packed tokens of steps that feed prompts; measured for the fewest requests
SELDOM = 3  # they are slow and change little: one round in so many
SAMPLES = 25
NEAR = 6  # neighbours in time, on both sides, that tell how fast the machine was
NAMES = {
    "target": ("requests", "tokens", "context"),
    "padding": ("requests", "tokens", "slots", "context"),
    "draft": ("requests", "context"),
}


class Workload:
    """Runs single points on loaded engines, on caches that hold whatever earlier points left there."""

    def __init__(self, engines: Engines, seed: int = 0):
        self.engines, self.rng = engines, np.random.default_rng(seed)
        bundle = engines.bundle
        self.G, self.S, self.V = bundle.draft.block_size, bundle.max_context, bundle.target.vocab_size
        self.V_d, self.slots = bundle.draft.vocab_size, bundle.draft.block_slots
        self.width = len(bundle.draft.layer_ids) * bundle.target.hidden_size

    def settle(self, rows: int, length: int) -> None:
        """The cache capacity that a loop with such requests would have (caches shrink only after many calls)."""
        for _ in range(PATIENCE + 1):
            self.engines.ensure_capacity(rows, length)

    def target(self, R: int, N: int, C: int) -> float:
        """ms of the target over N tokens of R requests (as even as can be) and the greedy verdicts over all of them."""
        counts = np.full(R, N // R)
        counts[: N % R] += 1
        return self._step(R, counts, C)

    def padding(self, R: int, N: int, Q: int, C: int) -> float:
        """The same where one request, or as many as that takes, feed Q tokens and the others one: R * Q - N padded slots."""
        counts = np.ones(R, np.int64)
        counts[: (N - R) // (Q - 1)] = Q
        return self._step(R, counts, C)

    def _step(self, R: int, counts: np.ndarray, C: int) -> float:
        e, G = self.engines, self.G
        e.ensure_capacity(R, C + int(counts.max()) + 1)
        tokens = [self.rng.integers(0, self.V, n).tolist() for n in counts]
        logits = np.minimum(counts, G + 1)  # a prompt's chunk has one at most, a block has all
        batch, _, logit_starts = pack_target(tokens, np.full(R, C), logits, e.target_capacity, self.S)
        drafts = self.rng.integers(0, self.V, (R, G))
        rows = logit_starts[:, None] + np.minimum(np.arange(G + 1), logits[:, None] - 1)
        started = perf_counter()
        result = e.target(batch)
        e.verify(VerifyBatch.greedy(result.logits, rows, drafts, logits - 1, self.V_d)).accepted  # read: waited for
        return 1e3 * (perf_counter() - started)

    def draft(self, R: int, C: int) -> float:
        """ms of backbone (1 to 3 new context rows a request), markov (greedy) and confidence."""
        e = self.engines
        e.ensure_capacity(R, C + 3 + self.slots)
        counts = 1 + np.arange(R) % 3
        pieces = [[self.rng.standard_normal((n, self.width), np.float32)] for n in counts]
        anchors = self.rng.integers(0, self.V, R)
        following = [self.rng.integers(0, self.V, n).tolist() for n in counts]
        spec, lengths = e.bundle.draft, np.full(R, C)
        batch = pack_draft(spec, pieces, following, counts, lengths, anchors, e.draft_capacity, self.S)
        started = perf_counter()
        backbone = e.backbone(batch)
        draws = MarkovBatch.greedy(backbone.hidden, backbone.base_logits, anchors, self.V, self.G)
        block = e.markov(draws_after(batch, backbone, draws))
        if e.bundle.draft.has_confidence:
            e.confidence(ConfidenceBatch(backbone.hidden, block.markov_embeddings)).confidence_logits
        block.draft_tokens  # read: waited for
        return 1e3 * (perf_counter() - started)

    def run(self, point: tuple) -> float:
        return getattr(self, point[0])(*point[1:])


def points(engines: Engines, requests: tuple[int, ...], context: int, quick: bool) -> tuple[list[tuple], list[tuple]]:
    """(steps that decode, steps that feed a prompt) at one context: ("target", R, N, C) | ("padding", R, N, Q, C) |
    ("draft", R, C), with N = R*(1+n) for n = 0..G, and PREFILL for the fewest requests. Padded: one request with a whole
    block, and half of them with half of one."""
    G, few = engines.bundle.draft.block_size, requests[0]
    decode = [("target", r, r * (1 + n), context) for r in requests for n in range(G + 1)]
    decode += [("draft", r, context) for r in requests]
    for r in requests:
        for members, more in {(1, G), (max(r // 2, 1), max(G // 2, 1))} if r > 1 else ():
            decode.append(("padding", r, r + members * more, 1 + more, context))
    room = engines.bundle.max_context - context - 1
    sizes = (64, 512) if quick else PREFILL
    return decode, [("target", few, n, context) for n in sizes if n > few * (1 + G) and -(-n // few) <= room]


def even(taken: list[tuple[tuple, float]]) -> dict[tuple, np.ndarray]:
    """Samples (point, ms) in the order of time -> the samples of each point, as if the machine had been as fast all along.

    A shared machine is slower for seconds or minutes at a time, and a point of a few samples would keep that. How slow it
    was at a sample is the median over its neighbours of their time over their own point's typical time, which comes from
    the evened samples in turn: a few rounds of that. A point's own shape is not smoothed with other points'.
    """
    points = sorted({point for point, _ in taken})
    index, ms = np.array([points.index(point) for point, _ in taken]), np.array([ms for _, ms in taken])
    pace, of = np.ones(len(ms)), [np.flatnonzero(index == i) for i in range(len(points))]
    near = np.arange(len(ms))[:, None] + np.arange(-NEAR, NEAR + 1)
    near = np.clip(near, 0, len(ms) - 1)
    for _ in range(4):
        typical = np.array([np.median(ms[at] / pace[at]) for at in of])
        pace = np.median((ms / typical[index])[near], axis=1)
    return {point: ms[at] / pace[at] for point, at in zip(points, of)}


def fitting(engines: Engines, contexts: tuple[int, ...]) -> tuple[int, ...]:
    """The contexts that leave room for a block; at least one, however short the bundle's own is."""
    most = engines.bundle.max_context - engines.bundle.draft.block_size - 4
    return tuple(sorted({max(min(c, most), 1) for c in contexts}))


def measure(
    engines: Engines,
    requests: tuple[int, ...] = REQUESTS,
    contexts: tuple[int, ...] = CONTEXTS,
    *,
    quick: bool = False,
    seconds: float = 200.0,
    progress: Callable[[float], None] = lambda share: None,
    seed: int = 0,
) -> dict[str, Any]:
    """Times every point in shuffled rounds (the first only warms up) until each has 25 samples or `seconds` are over,
    and 3 times at least. progress: is told the share of the work that is done.

    Returns {requests, contexts, target: [...], draft: [...], padding: [...]} of the manifest's `sps`: medians, 10th and
    90th percentiles, ms, of what `even` makes of the samples. Raises BundleError for requests or contexts out of range.
    """
    for name, values in (("requests", requests), ("contexts", contexts)):
        if not values or min(values) < 1:
            raise BundleError(f"{name} is {list(values)}; it must be a list of numbers of 1 or more.")
    requests, contexts = tuple(sorted(set(requests))), fitting(engines, contexts)
    work, rng, G = Workload(engines, seed), np.random.default_rng(seed), engines.bundle.draft.block_size
    phases = {c: points(engines, requests, c, quick) for c in contexts}
    taken: list[tuple[tuple, float]] = []  # (point, ms) in the order of time
    # memory first: a table that does not fit should fail at once, and growing is not what is timed
    work.settle(requests[-1], min(contexts[-1] + G + 4, engines.bundle.max_context))
    started, rounds = perf_counter(), 0
    while rounds <= SAMPLES:
        passed = perf_counter() - started
        if rounds > 3 and passed * (rounds + 1) / rounds > seconds:
            break
        for at, c in enumerate(rng.permutation(contexts).tolist()):
            decode, prompt = phases[c]
            work.settle(requests[-1], min(c + G + 4, engines.bundle.max_context))
            order = [decode[i] for i in rng.permutation(len(decode))]
            if rounds % SELDOM == 0:
                order += [prompt[i] for i in rng.permutation(len(prompt))]
            for point in order:
                ms = work.run(point)
                if rounds or point in prompt:
                    taken.append((point, ms))
            part = (rounds + (at + 1) / len(contexts)) / (SAMPLES + 1)
            progress(min(max(part, (perf_counter() - started) / seconds), 1.0))
        rounds += 1
    table: dict[str, Any] = {"requests": list(requests), "contexts": list(contexts), "target": [], "draft": [], "padding": []}
    for point, times in even(taken).items():
        low, mid, high = np.percentile(times, (10, 50, 90)).round(4).tolist()
        row = {name: int(value) for name, value in zip(NAMES[point[0]], point[1:])}
        if "slots" in row:  # of a request; the table says of the step
            row["slots"] *= row["requests"]
        table[point[0]].append({**row, "ms": mid, "low": low, "high": high, "samples": len(times)})
    return table


def profile(engines: Engines, *, write: bool = True, **options: Any) -> dict[str, Any]:
    """measure(), written into the bundle's manifest (unless not `write`) with where it was taken. Returns its `sps`."""
    table = measure(engines, **options)
    sps = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "engines", *sys.argv[1:]]) if "engines" in sys.argv[0] else "at a start",
        "hardware": hardware(),
        "threads": engines.threads,
        "provider": engines.provider,
        "engines": engines.bundle.hashes,
        **table,
    }
    if write:
        update_manifest(engines.bundle.folder, sps=sps)
    return sps
