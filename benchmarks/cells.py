"""The cells of the throughput grid: build/bench.json, a list of objects, and build/bench.meta.json beside it.

Knows: which cell a row is, which rows belong together, their ratios. Refuses to know: how a cell is measured.

A cell is (mode, kind, concurrency, path, temperature). A later run replaces its own cells; the others stay as long as
they are of the same machine and the same bundle. Ratios are taken between rows of one run only: `run` names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .common import median, write_json

MODES = ("none", "fixed", "threshold", "causal", "lagged")
PATHS = ("in_process", "grpc")
BASELINES = ("none", "fixed")  # the extremes that load-aware scheduling must not lose to
REQUIRED = (
    "total_tok_s",
    "user_tok_s",
    "ttft_ms",
    "itl_ms",
    "acceptance_length",
    "verified_per_round",
    "rejected_share",
    "host_share",
)
OPTIONAL = ("itl_p95_ms", "no_draft_share", "step_ms", "tokens", "seconds")


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("mode", "kind", "concurrency", "path", "temperature"))


def order(row: dict) -> tuple:
    """Kinds as they were run; levels, modes and paths as they are listed."""
    mode = MODES.index(row["mode"]) if row["mode"] in MODES else len(MODES)
    return row["temperature"], row["kind"], row["concurrency"], PATHS.index(row["path"]), mode


def make_row(cell: dict, windows: Sequence[dict]) -> dict:
    """Medians of what the repeats measured (None where none did), the spread of the main ones, and each total_tok_s."""
    row = dict(cell)
    for name in (*REQUIRED, *OPTIONAL):
        values = [w[name] for w in windows if w.get(name) is not None]
        row[name] = round(median(values), 4) if values else None
    splits = [w["split_ms"] for w in windows if "split_ms" in w]
    if splits:
        names = dict.fromkeys(name for split in splits for name in split)
        row["split_ms"] = {n: round(median(split.get(n, 0.0) for split in splits), 3) for n in names}
    row["repeats"] = [round(w["total_tok_s"], 3) for w in windows]
    if all("turns" in w for w in windows):
        row["turns"] = [[round(rate, 2) for rate in w["turns"]] for w in windows]
    row["spread"] = {
        name: [round(min(values), 4), round(max(values), 4)]
        for name in ("total_tok_s", "user_tok_s", "ttft_ms", "itl_ms")
        if (values := [w[name] for w in windows if w[name] is not None])
    }
    return row


def with_ratios(rows: Iterable[dict]) -> list[dict]:
    """The rows with ratio_to_none, ratio_to_best (of BASELINES; best by its median) and grpc_ratio (to the same cell in
    process), see `ratio`. None where the other row is missing or of another run."""
    rows = list(rows)
    found = {key(row): row for row in rows}

    def other(row: dict, **changed) -> dict | None:
        there = found.get(key(row | changed))
        return there if there is not None and there["run"] == row["run"] else None

    made = []
    for row in rows:
        plain = other(row, mode="none")
        bases = [other(row, mode=mode) for mode in BASELINES]
        best = max(bases, key=lambda r: r["total_tok_s"]) if all(bases) else None
        direct = other(row, path="in_process") if row["path"] == "grpc" else None
        ratios = {"ratio_to_none": _ratio(row, plain), "ratio_to_best": _ratio(row, best)}
        made.append(row | ratios | ({"grpc_ratio": _ratio(row, direct)} if row["path"] == "grpc" else {}))
    return made


def ratio(row: dict, to: dict) -> tuple[float, float, float]:
    """(throughput of a row over another's of its run, 5th and 95th percentile of that estimate).

    Of rows whose modes took turns: over all repeats together, the same tokens of the same requests over the seconds that
    each took; the percentiles by resampling pairs of turns. Of others: the median of the repeats' ratios and their span.
    """
    if "turns" not in row or "turns" not in to:
        each = [a / b for a, b in zip(row["repeats"], to["repeats"])]
        return median(each), min(each), max(each)
    pairs = [(1 / a, 1 / b) for x, y in zip(row["turns"], to["turns"]) for a, b in zip(x, y)]  # as many tokens each
    seconds = np.array(pairs)
    drawn = seconds[np.random.default_rng(0).integers(0, len(seconds), (1000, len(seconds)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 1] / drawn[:, 0], (5, 95))
    mine, theirs = seconds.sum(axis=0)
    return float(theirs / mine), float(low), float(high)


def _ratio(row: dict, to: dict | None) -> float | None:
    return to and round(ratio(row, to)[0], 4)


class Grid:
    """The two files at `path`. Opening it for another machine or bundle than the rows there sets those aside."""

    def __init__(self, path: Path, same: dict, run: dict, say=print):
        """same: what must agree for rows to stay (machine, bundle); run: what is told of this run's rows."""
        self.path, self.meta_path = path, path.with_name(path.stem + ".meta.json")
        self.rows: dict[tuple, dict] = {}
        self.meta = {**same, "runs": {}}
        rows, meta = read(path)
        if rows and {name: meta.get(name) for name in same} == same:
            self.rows, self.meta = {key(row): row for row in rows}, meta
        elif rows:
            aside = path.with_name(f"{path.stem}.previous.json")
            path.replace(aside)
            self.meta_path.unlink(missing_ok=True)
            say(f"{path.name} was taken on another machine or of another bundle: kept as {aside.name}.")
        self.run = f"{run['date']} {len(self.meta['runs'])}"
        self.meta["runs"][self.run] = run

    def put(self, rows: Iterable[dict]) -> list[dict]:
        """Replaces these cells, writes both files, and gives the cells with their ratios."""
        added = [{**row, "run": self.run} for row in rows]
        self.rows |= {key(row): row for row in added}
        rows = with_ratios(sorted(self.rows.values(), key=order))
        self.rows = {key(row): row for row in rows}
        used = {row["run"] for row in rows}
        self.meta["runs"] = {name: run for name, run in self.meta["runs"].items() if name in used}
        write_json(self.path, rows)
        write_json(self.meta_path, self.meta)
        return [self.rows[key(row)] for row in added]


def read(path: Path) -> tuple[list[dict], dict]:
    """(rows, meta); empty ones where there is no file or it has another form."""
    meta_path = path.with_name(path.stem + ".meta.json")
    try:
        rows = json.loads(path.read_text())
        meta = json.loads(meta_path.read_text())
    except (OSError, ValueError):
        return [], {}
    return (rows, meta) if isinstance(rows, list) and isinstance(meta, dict) else ([], {})


def fingerprint(manifest: dict) -> dict:
    """What makes two bundles the same for a benchmark: the engines' and the checkpoints' hashes."""
    engines = json.dumps({name: e["sha256"] for name, e in manifest["engines"].items()}, sort_keys=True)
    return {
        "target": manifest["target"]["name"],
        "dtype": manifest["dtype"],
        "block_size": manifest["draft"]["block_size"],
        "target_hash": manifest["target"]["hash"],
        "draft_hash": manifest["draft"]["hash"],
        "engines_hash": hashlib.sha256(engines.encode()).hexdigest(),
    }
