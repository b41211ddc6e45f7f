"""What drafts are worth, from recorded rounds (`python -m decoding record`): one report with tables and pictures.

Knows: the measures of the paper's figures 2 to 6: acceptance by position, by proposal length, under a confidence
threshold, and how far predicted survival can be trusted. Refuses to know: how rounds were recorded, time.

A recorded round verified its whole block, so what a shorter proposal or a threshold would have got follows from it.
Legend: B rounds, G block size. tau: accepted tokens a round and the bonus token (acceptance length).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy import ndarray

from training.rollouts import Rollouts, read_rollouts
from training.scores import ece, sigmoid, survival

from .common import Columns, markdown_table, write_result

THRESHOLDS = np.round(np.arange(0.0, 0.96, 0.05), 2)
ALL = "all"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Head:
    """A draft's recorded rounds, named for the report. temperatures, biases: {"greedy" | "sampled": [G]} of its
    calibration; none = the raw confidences."""

    name: str
    rollouts: Rollouts
    calibration: dict | None = None

    def survival(self) -> ndarray:
        """[B, G] predicted chance that the first k + 1 tokens are all accepted."""
        r, G = self.rollouts, self.rollouts.logits.shape[1]
        if self.calibration is None:
            return np.cumprod(sigmoid(r.logits), axis=1)
        made = np.empty_like(r.logits)
        for kind, mask in (("greedy", r.temperature == 0), ("sampled", r.temperature > 0)):
            bias = self.calibration.get("bias", {}).get(kind, [0.0] * G)
            made[mask] = survival(r.logits[mask], np.array(self.calibration[kind]), np.array(bias))
        return made


def by_position(accepted: ndarray, G: int) -> list[float | None]:
    """[G] share accepted at each position of the rounds that got as far; None where none did."""
    reached = [int((accepted >= k).sum()) for k in range(G)]
    return [float((accepted > k).sum() / n) if n else None for k, n in enumerate(reached)]


def by_length(accepted: ndarray, G: int) -> list[float]:
    """[G] tau with proposals of 1 .. G tokens."""
    return [1.0 + float(np.minimum(accepted, n).mean()) for n in range(1, G + 1)]


def under(threshold: float, predicted: ndarray, accepted: ndarray) -> dict[str, float]:
    """A block cut before its first position whose predicted survival is below the threshold."""
    lengths = np.cumprod(predicted >= threshold, axis=1).sum(axis=1)
    kept = np.minimum(accepted, lengths)
    verified = float(lengths.mean())
    return {
        "threshold": float(threshold),
        "tau": 1.0 + float(kept.mean()),
        "verified": verified,
        "rejected": 1.0 - float(kept.sum() / lengths.sum()) if verified else 0.0,
    }


def evaluate(head: Head) -> dict:
    """{name, rows: a group of rounds each (kind and temperature; all kinds together last), thresholds, ece [G], depth (None
    in older recordings), block_size, kind}."""
    r, G = head.rollouts, head.rollouts.logits.shape[1]
    predicted = head.survival()
    rows = []
    for temperature in np.unique(r.temperature):
        at = r.temperature == temperature
        for kind in [*dict.fromkeys(r.kind.tolist()), ALL]:
            accepted = r.accepted[at if kind == ALL else at & (r.kind == kind)]
            if len(accepted):
                rows.append(
                    {
                        "kind": kind, "temperature": float(temperature), "rounds": len(accepted),
                        "tau": 1.0 + float(accepted.mean()), "verify_rate": float(accepted.mean() / G),
                        "positions": by_position(accepted, G), "lengths": by_length(accepted, G),
                    }
                )  # fmt: skip
    errors = ece(predicted.T, r.survived.T).tolist()
    return {"name": head.name, "rows": rows, "thresholds": [under(t, predicted, r.accepted) for t in THRESHOLDS],
            "ece": errors, "calibrated": head.calibration is not None, "depth": r.meta.get("depth"), "block_size": G,
            "kind": r.meta.get("kind", "draft")}  # fmt: skip


def depths(results: list[dict]) -> dict[tuple[str, int, float], list[tuple[int, float]]]:
    """{(kind of draft, block size, temperature): [(its layers, tau over all prompts)]}, where drafts of a kind differ in
    depth (as far as a recording says it)."""
    lines: dict[tuple[str, int, float], list[tuple[int, float]]] = {}
    for result in results:
        for row in result["rows"]:
            if row["kind"] == ALL and result["depth"] is not None:
                lines.setdefault((result["kind"], result["block_size"], row["temperature"]), []).append((result["depth"], row["tau"]))
    return {key: sorted(points) for key, points in lines.items() if len({depth for depth, _ in points}) > 1}


# -- the report -------------------------------------------------------------------------------------------------------


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


GAIN = ("to the first draft", lambda r: r["against"])
COLUMNS: Columns = (
    ("prompts", lambda r: r["kind"]),
    ("temperature", lambda r: f"{r['temperature']:g}"),
    ("draft", lambda r: r["name"]),
    ("rounds", lambda r: f"{r['rounds']:,}"),
    ("acceptance length", lambda r: f"{r['tau']:.2f}"),
    GAIN,
    ("accepted of the drafted %", lambda r: share(r["verify_rate"])),
    ("accepted by position, given those before %", lambda r: " ".join(share(p) for p in r["positions"])),
)
CUTS: Columns = (
    ("draft", lambda r: r["name"]),
    ("threshold", lambda r: f"{r['threshold']:.2f}"),
    ("acceptance length", lambda r: f"{r['tau']:.2f}"),
    ("verified a round", lambda r: f"{r['verified']:.2f}"),
    ("rejected %", lambda r: share(r["rejected"])),
)


def side_by_side(results: list[dict]) -> list[dict]:
    """The rows of all drafts, group by group, each with its gain over the first draft's."""
    first = {(r["kind"], r["temperature"]): r["tau"] for r in results[0]["rows"]}
    rows = []
    for result in results:
        for row in result["rows"]:
            base = first.get((row["kind"], row["temperature"]))
            gain = "" if base is None or result is results[0] else f"{100 * (row['tau'] / base - 1):+.0f}%"
            rows.append({**row, "name": result["name"], "against": gain})
    groups = list(first) + [k for k in dict.fromkeys((r["kind"], r["temperature"]) for r in rows) if k not in first]
    return sorted(rows, key=lambda r: groups.index((r["kind"], r["temperature"])))


def report(results: list[dict], command: str) -> str:
    """Markdown; the pictures lie beside it."""
    cuts = [{**t, "name": r["name"]} for r in results for t in r["thresholds"][::4]]
    errors = "; ".join(
        f"{r['name']}{' (calibrated)' if r['calibrated'] else ' (raw)'}: "
        + " ".join(f"{100 * e:.1f}" for e in r["ece"])
        for r in results
    )
    parts = [
        "# Evaluation of drafts",
        f"`{command}`",
        "Every round verified its whole block; acceptance length counts the bonus token (plain decoding: 1.00).",
        markdown_table(COLUMNS if len(results) > 1 else [c for c in COLUMNS if c is not GAIN], side_by_side(results)),
        "## By position, by proposal length",
        "![acceptance by position](positions.png)\n![acceptance length by proposal length](lengths.png)",
        *(["## By depth", "![acceptance length by the draft's layers](depths.png)"] if depths(results) else []),
        "## Under a threshold on predicted survival",
        "![acceptance length against verified tokens](thresholds.png)",
        markdown_table(CUTS, cuts),
        "## How far the predicted survival can be trusted",
        "![predicted against observed survival](reliability.png)",
        f"Expected calibration error by position, %: {errors}. (A calibration was fitted on some of these rounds where "
        "they are the same recording.)",
    ]
    return "\n\n".join(parts) + "\n"


@app.command()
def main(
    rollouts: Annotated[list[str], typer.Option(help="NAME=FILE of `python -m decoding record`; again for more drafts")],
    calibration: Annotated[list[str], typer.Option(help="NAME=FILE of `python -m training calibrate`")] = [],
    out: Annotated[Path, typer.Option(help="folder of report.md, eval.json and the pictures")] = Path("build/eval"),
) -> None:
    """Tables and pictures of recorded drafts, side by side."""
    import json

    from .evaluation_pictures import draw

    try:
        files, fitted = named(rollouts, "rollouts"), named(calibration, "calibration")
        if odd := sorted(fitted.keys() - files.keys()):
            raise ValueError(f"calibration names {odd[0]!r}; the drafts are {', '.join(files)}.")
        heads = [
            Head(name, read_rollouts(file), json.loads(fitted[name].read_text()) if name in fitted else None)
            for name, file in files.items()
        ]
        if empty := [h.name for h in heads if not len(h.rollouts)]:
            raise ValueError(f"the rollouts of {empty[0]!r} hold no round.")
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    results = [evaluate(head) for head in heads]
    write_result(out / "eval.json", {"drafts": results})
    command = json.loads((out / "eval.json").read_text())["command"]
    for path in draw(heads, results, depths(results), out):
        print(f"written: {path}")
    (out / "report.md").write_text(report(results, command))
    print(f"written: {out / 'report.md'}")


def named(pairs: list[str], option: str) -> dict[str, Path]:
    """{NAME: FILE} of NAME=FILE texts. Raises ValueError for another form, or a name given twice."""
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not (name and equals and file) or name in found:
            raise ValueError(f"{option} is {pair!r}; it must be NAME=FILE, each name once.")
        found[name] = Path(file)
    return found


if __name__ == "__main__":
    app()
