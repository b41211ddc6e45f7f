"""The pictures of benchmarks/evaluation.py.

Knows: its results, matplotlib. Refuses to know: where they come from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot: no global state, no display

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.")


def draw(heads, results, depths, folder: Path) -> list[Path]:
    """positions.png and lengths.png (a panel a temperature, a colour a kind, a dash a draft), thresholds.png,
    reliability.png (a panel a draft, a colour a position), and depths.png where there is something to show."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        *([_depths(depths, folder / "depths.png")] if depths else []),
        _groups(results, folder / "positions.png", "positions", "draft position", "accepted, given those before", 100),
        _groups(results, folder / "lengths.png", "lengths", "proposal length", "acceptance length", 1),
        _thresholds(results, folder / "thresholds.png"),
        _reliability(heads, folder / "reliability.png"),
    ]


def _groups(results, path: Path, key: str, across: str, up: str, factor: float) -> Path:
    temperatures = sorted({row["temperature"] for r in results for row in r["rows"]})
    kinds = list(dict.fromkeys(row["kind"] for r in results for row in r["rows"]))
    figure, panels = _figure(len(temperatures))
    for axes, temperature in zip(panels, temperatures):
        for dash, result in zip(_cycle(DASHES), results):
            for row in result["rows"]:
                if row["temperature"] == temperature:
                    y = [np.nan if v is None else factor * v for v in row[key]]
                    label = row["kind"] if len(results) == 1 else f"{row['kind']}, {result['name']}"
                    colour = COLOURS[kinds.index(row["kind"]) % len(COLOURS)]
                    axes.plot(range(1, len(y) + 1), y, "o", ls=dash, ms=4, color=colour, label=label)
        axes.set(title=f"temperature {temperature:g}", xlabel=across)
        axes.set_ylim(*((0, 100) if factor == 100 else (1, None)))
    panels[0].set_ylabel(up + (" %" if factor == 100 else ""))
    return _save(figure, panels, path)


def _depths(lines, path: Path) -> Path:
    figure, (axes,) = _figure(1)
    for colour, ((kind, block, temperature), points) in zip(_cycle(COLOURS), lines.items()):
        label = f"{kind}, block size {block}, temperature {temperature:g}"
        axes.plot(*zip(*points), "o-", ms=4, color=colour, label=label)
    axes.set(xlabel="layers of the draft", ylabel="acceptance length", xticks=sorted({d for p in lines.values() for d, _ in p}))
    return _save(figure, (axes,), path)


def _thresholds(results, path: Path) -> Path:
    figure, (left, right) = _figure(2)
    for colour, result in zip(_cycle(COLOURS), results):
        cuts = result["thresholds"]
        left.plot([t["verified"] for t in cuts], [t["tau"] for t in cuts], "o-", ms=3, color=colour, label=result["name"])
        right.plot([t["threshold"] for t in cuts], [100 * t["rejected"] for t in cuts], "o-", ms=3, color=colour)
    left.set(xlabel="draft tokens verified a round", ylabel="acceptance length")
    right.set(xlabel="threshold", ylabel="verified tokens rejected %")
    return _save(figure, (left, right), path)


def _reliability(heads, path: Path) -> Path:
    figure, panels = _figure(len(heads))
    for axes, head in zip(panels, heads):
        predicted, observed = head.survival(), head.rollouts.survived
        axes.plot([0, 1], [0, 1], color="0.6", lw=0.8)
        for k, colour in zip(range(predicted.shape[1]), _cycle(COLOURS)):
            bins = [b for b in np.array_split(np.argsort(predicted[:, k], kind="stable"), 15) if len(b)]
            x, y = ([values[b, k].mean() for b in bins] for values in (predicted, observed))
            axes.plot(x, y, "o-", ms=3, lw=1.2, color=colour, label=f"position {k + 1}")
        axes.set(title=head.name, xlabel="predicted survival", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panels[0].set_ylabel("observed survival")
    return _save(figure, panels, path)


def _cycle(values: tuple):
    while True:
        yield from values


def _figure(columns: int):
    figure = Figure(figsize=(max(5.0, 4.2 * columns), 4.2), layout="constrained", dpi=120)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure, panels, path: Path) -> Path:
    for axes in panels:
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    panels[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    return path
