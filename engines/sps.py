"""The SPS table of a bundle: what one step costs on this machine, measured by `python -m engines profile`.

Knows: milliseconds of the target (with verify) over requests, packed tokens and context, of a padded slot, and of the
draft. Refuses to know: schedulers, how the points were measured.

Attention works on [R, Q] slots, Q the longest block (or chunk) of the step, and on as many cached positions as the
longest request has: a step whose requests feed unlike numbers of tokens pays for R * Q - N padded slots too, and a step's
context is that of its longest request.

Nothing is assumed about a curve's shape: matrix kernels work in tiles, so a step of 17 tokens may cost more than one of
24, and a scheduler has to see that.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from .bundle import Bundle, BundleError

STEP = 64  # cached positions between two kept curves: a curve's context is rounded to a multiple of it
_PROFILE = "run make profile (python -m engines profile)"


class Sps:
    """Step times by interpolation, linear in each of requests R, packed tokens N and mean cached context.

    Within a table's range the measured points are met exactly. Beyond the last requests, tokens or context the last
    slope goes on; below the first requests or context the first value stays. The points of a given R begin at N = R and
    lie R apart: between and beyond them its curve has the shape of the next smaller R's, so that a jump at some N stays
    at that N.
    """

    def __init__(
        self, requests: ndarray, contexts: ndarray, grid: ndarray, target: ndarray, draft: ndarray, slot: ndarray
    ):
        """requests [A], contexts [B], grid [T] packed tokens, ascending; target [A, B, T] ms, draft and slot [A, B] ms."""
        self.requests, self.contexts, self.grid = requests, contexts, grid
        self._target, self._draft, self._slot = target, draft, slot
        self._curves: dict[tuple[int, int], ndarray] = {}
        self._others: dict[tuple[int, int], tuple[float, float]] = {}
        self.has_confidence = True

    @classmethod
    def from_points(
        cls,
        target: Iterable[tuple[int, int, int, float]],
        draft: Iterable[tuple[int, int, float]],
        has_confidence: bool = True,
        padding: Iterable[tuple[int, int, int, int, float]] = (),
    ) -> Sps:
        """target: (requests, tokens, context, ms), the requests feeding alike; draft: (requests, context, ms); padding:
        (requests, tokens, slots, context, ms) of steps with more slots than tokens; without any, a padded slot is
        free. Raises BundleError for a hole."""
        points: dict[tuple[int, int], dict[int, float]] = {}
        for r, n, c, ms in target:
            points.setdefault((int(r), int(c)), {})[int(n)] = _positive(ms, f"requests {r}, tokens {n}, context {c}")
        drafts = {(int(r), int(c)): _positive(ms, f"the draft at requests {r}, context {c}") for r, c, ms in draft}
        if not points:
            raise BundleError(f"the SPS table holds no points; {_PROFILE}.")
        requests, contexts = (np.array(sorted({key[i] for key in points})) for i in (0, 1))
        grid = np.array(sorted({n for curve in points.values() for n in curve}))
        table = np.empty((len(requests), len(contexts), len(grid)))
        costs = np.empty(table.shape[:2])
        for b, c in enumerate(contexts.tolist()):
            for a, r in enumerate(requests.tolist()):
                if (r, c) not in points:
                    raise BundleError(f"the SPS table has a hole at requests {r}, context {c}; {_PROFILE}.")
                if (r, c) not in drafts:
                    raise BundleError(f"the SPS table has a hole for the draft at requests {r}, context {c}; {_PROFILE}.")
                own = sorted(points[r, c].items())
                at, ms = np.array([n for n, _ in own]), np.array([t for _, t in own])
                if a:  # what it costs more than fewer requests do, in a line; the shape is theirs
                    fewer = table[a - 1, b]
                    table[a, b] = fewer + np.interp(grid, at, ms - fewer[np.searchsorted(grid, at)])
                else:
                    table[a, b] = _line(grid, at, ms)
                costs[a, b] = drafts[r, c]
        slot, padding = np.zeros(costs.shape), list(padding)
        for a, b in np.ndindex(costs.shape):
            here = [p for p in padding if (p[0], p[3]) == (requests[a], contexts[b])]
            if here:  # least squares through the origin
                tokens, slots, ms = (np.array([p[i] for p in here], np.float64) for i in (1, 2, 4))
                more, empty = ms - np.interp(tokens, grid, table[a, b]), slots - tokens
                slot[a, b] = max(float(more @ empty / (empty @ empty)), 0.0)
        sps = cls(requests, contexts, grid, np.maximum(table, 1e-6), costs, slot)
        sps.has_confidence = has_confidence
        return sps

    @classmethod
    def of(cls, engines: Any) -> Sps:
        """The table in the manifest of a loaded bundle. Raises BundleError, in one sentence, when there is none, when it
        was taken on other hardware, with other engines or threads, or when it has a hole."""
        check(engines.bundle, threads=engines.threads, provider=engines.provider)
        sps = engines.bundle.sps
        return cls.from_points(
            [(p["requests"], p["tokens"], p["context"], p["ms"]) for p in sps["target"]],
            [(p["requests"], p["context"], p["ms"]) for p in sps["draft"]],
            engines.bundle.draft.has_confidence,
            [(p["requests"], p["tokens"], p["slots"], p["context"], p["ms"]) for p in sps["padding"]],
        )

    def target_ms(self, requests: int, tokens: ndarray | int, context: float) -> ndarray:
        """ms of a step's target pass and verify, of the shape of `tokens`: packed tokens in all, of `requests` requests
        that hold `context` tokens each."""
        return _line(np.asarray(tokens), self.grid, np.maximum(self._at(self._target, requests, context), 1e-6))

    @property
    def pads(self) -> bool:
        """Padded slots cost time, for some number of requests."""
        return bool((self._slot > 0).any())

    def slot_ms(self, requests: int, context: float) -> float:
        """ms of one padded slot."""
        return float(max(self._at(self._slot, requests, context), 0.0))

    def draft_ms(self, requests: int, context: float) -> float:
        """ms of backbone, markov and confidence for `requests` requests."""
        return float(max(self._at(self._draft, requests, context), 1e-6))

    def curve(self, requests: int, most: int, context: float) -> ndarray:
        """[>= most + 1] ms of a step with 0, 1, .. packed tokens (target_ms at the nearest multiple of 64 of context);
        kept, so that a decision costs a look-up."""
        key = requests, int(context / STEP + 0.5)
        kept = self._curves.get(key)
        if kept is None or len(kept) <= most:
            if len(self._curves) >= 1024:
                self._curves.clear()
            length = max(most + 1, 2 * len(kept)) if kept is not None else most + 1
            kept = self._curves[key] = self.target_ms(requests, np.arange(length), key[1] * STEP)
        return kept

    def others(self, requests: int, context: float) -> tuple[float, float]:
        """(draft_ms, slot_ms) at the nearest multiple of 64 of context; kept."""
        key = requests, int(context / STEP + 0.5)
        if key not in self._others:
            if len(self._others) >= 1024:
                self._others.clear()
            at = requests, key[1] * STEP
            self._others[key] = self.draft_ms(*at), self.slot_ms(*at)
        return self._others[key]

    def _at(self, table: ndarray, requests: float, context: float) -> ndarray:
        a0, a1, wa = _bracket(self.requests, requests)
        b0, b1, wb = _bracket(self.contexts, context)
        low = table[a0, b0] + wb * (table[a0, b1] - table[a0, b0])
        high = table[a1, b0] + wb * (table[a1, b1] - table[a1, b0])
        return low + wa * (high - low)


def check(bundle: Bundle, *, threads: int, provider: str) -> None:
    """Raises BundleError, in one sentence, when the bundle's SPS table is not one of this machine and these engines."""
    name, sps = bundle.folder, bundle.sps
    if not sps:
        raise BundleError(f"{name} has no SPS table, which the schedulers causal and lagged need; {_PROFILE}.")
    try:
        here, there = hardware(), dict(sps["hardware"])
        if here != there:
            raise BundleError(f"{name}: the SPS table was taken on {_say(there)}, this is {_say(here)}; {_PROFILE}.")
        for engine, sha256 in bundle.hashes.items():
            if sps["engines"].get(engine) != sha256:
                what = "other kernels" if engine == "kernels" else f"another {engine} engine"
                raise BundleError(f"{name}: the SPS table was taken with {what}; {_PROFILE}.")
        for key, value in (("threads", threads), ("provider", provider)):
            if sps[key] != value:
                raise BundleError(f"{name}: the SPS table was taken with {key} {sps[key]!r}, this is {value!r}; {_PROFILE}.")
        have = {(p["requests"], p["tokens"], p["context"]) for p in sps["target"]}
        drafts = {(p["requests"], p["context"]) for p in sps["draft"]}
        padded = {(p["requests"], p["context"]) for p in sps["padding"] if p["slots"] > p["tokens"]}
        for r in sps["requests"]:
            for c in sps["contexts"]:
                for n in range(bundle.draft.block_size + 1):
                    if (r, r * (1 + n), c) not in have:
                        where = f"requests {r}, tokens {r * (1 + n)}, context {c}"
                        raise BundleError(f"{name}: the SPS table has a hole at {where}; {_PROFILE}.")
                where = f"requests {r}, context {c}"
                if (r, c) not in drafts:
                    raise BundleError(f"{name}: the SPS table has a hole for the draft at {where}; {_PROFILE}.")
                if r > 1 and (r, c) not in padded:
                    raise BundleError(f"{name}: the SPS table has a hole for padded slots at {where}; {_PROFILE}.")
        for p in (*sps["target"], *sps["draft"], *sps["padding"]):
            _positive(p["ms"], ", ".join(f"{k} {p[k]}" for k in ("requests", "tokens", "context") if k in p))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{name}: the SPS table is not readable ({type(error).__name__}: {error}); {_PROFILE}.") from None


def hardware() -> dict[str, Any]:
    """{cpu: its name, cores: physical ones that this process may use}."""
    from .onnxruntime import physical_cores

    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name"))
        name = next(lines, name)
    return {"cpu": name, "cores": physical_cores()}


def _say(hardware: dict) -> str:
    return f"{hardware.get('cpu')} with {hardware.get('cores')} cores"


def _positive(ms: Any, where: str) -> float:
    if not isinstance(ms, (int, float)) or isinstance(ms, bool) or not (math.isfinite(ms) and ms > 0):
        raise BundleError(f"the SPS table holds {ms!r} ms at {where}, it must be a positive number; {_PROFILE}.")
    return float(ms)


def _bracket(axis: ndarray, value: float) -> tuple[int, int, float]:
    """Neighbours a0, a1 on an ascending axis and the weight of a1: over 1 beyond the last, 0 below the first."""
    if len(axis) == 1 or value <= axis[0]:
        return 0, 0, 0.0
    a1 = min(int(np.searchsorted(axis, value)), len(axis) - 1)
    return a1 - 1, a1, (value - axis[a1 - 1]) / (axis[a1] - axis[a1 - 1])


def _line(x: ndarray, at: ndarray, values: ndarray) -> ndarray:
    """Linear interpolation; beyond the last point the last slope goes on (flat below the first, and with one point)."""
    y = np.interp(x, at, values)
    if len(at) > 1:
        slope = (values[-1] - values[-2]) / (at[-1] - at[-2])
        y = y + np.maximum(x - at[-1], 0) * max(slope, 0.0)
    return y
