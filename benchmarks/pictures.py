"""Draws docs/images/pareto.png and docs/images/budget.png from build/bench.json (the paper's Figures 7 and 8).

Knows: the rows of benchmarks/cells.py. Refuses to know: how they were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

from . import bundle as bundles  # noqa: E402
from .cells import MODES, read  # noqa: E402
from .common import KINDS  # noqa: E402

# Okabe and Ito's colours differ for every kind of colour blindness; markers and dashes differ too.
STYLES = {
    "none": {"color": "#000000", "marker": "o", "linestyle": ":"},
    "fixed": {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    "threshold": {"color": "#56B4E9", "marker": "^", "linestyle": "-."},
    "causal": {"color": "#CC79A7", "marker": "v", "linestyle": "-"},
    "lagged": {"color": "#009E73", "marker": "D", "linestyle": "-"},
}
FONT = {"font.size": 12, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def draw_pareto(rows: Sequence[dict], path: Path) -> None:
    """A panel a kind, a line a mode: tokens a second of one user against those of all; a point a number of users."""
    kinds = kinds_of(rows)
    figure, panels = _figure(1, len(kinds), height=4.6)
    for axes, kind in zip(panels[0], kinds):
        for mode, line in lines(rows, kind).items():
            line = [r for r in line if r["user_tok_s"]]
            x, y = [r["user_tok_s"] for r in line], [r["total_tok_s"] for r in line]
            axes.plot(x, y, label=mode, **_style(mode))
            if mode == "none":  # one line is enough to read the numbers of users from
                for r in line:
                    at = (r["user_tok_s"], r["total_tok_s"])
                    axes.annotate(f"{r['concurrency']}", at, (-7, -13), textcoords="offset points", fontsize=10)
        _logarithmic(axes.xaxis, axes.set_xscale)
        _logarithmic(axes.yaxis, axes.set_yscale)
        axes.set_title(kind)
        axes.set_xlabel("tok/s of one user")
    panels[0][0].set_ylabel("output tok/s, all users")
    _save(figure, panels, path)


def draw_budget(rows: Sequence[dict], path: Path) -> None:
    """Above: draft tokens verified for a request in a round; below: acceptance length; both against the users."""
    kinds = kinds_of(rows)
    figure, panels = _figure(2, len(kinds), height=6.6)
    for column, kind in enumerate(kinds):
        for mode, line in lines(rows, kind).items():
            users = [r["concurrency"] for r in line]
            for row, name in enumerate(("verified_per_round", "acceptance_length")):
                panels[row][column].plot(users, [r[name] for r in line], label=mode, **_style(mode))
        levels = sorted({r["concurrency"] for r in rows if r["kind"] == kind})
        for row in (0, 1):
            axes = panels[row][column]
            axes.set_xscale("log", base=2)
            axes.set_xticks(levels, [str(level) for level in levels])
            axes.set_ylim(bottom=-0.15 if row == 0 else 0.95)
        panels[0][column].set_title(kind)
        panels[1][column].set_xlabel("users")
    panels[0][0].set_ylabel("draft tokens verified\na request and round")
    panels[1][0].set_ylabel("tokens a target pass\n(acceptance length)")
    _save(figure, panels, path)


def kinds_of(rows: Sequence[dict]) -> list[str]:
    """The repository's kinds in their order, then others."""
    found = dict.fromkeys(r["kind"] for r in rows)
    return [k for k in KINDS if k in found] + [k for k in found if k not in KINDS]


def lines(rows: Sequence[dict], kind: str) -> dict[str, list[dict]]:
    """The rows of each mode of one kind, by number of users."""
    of = lambda mode: sorted(
        (r for r in rows if r["kind"] == kind and r["mode"] == mode), key=lambda r: r["concurrency"]
    )
    return {mode: found for mode in MODES if (found := of(mode))}


def _figure(rows: int, columns: int, height: float):
    plt.rcParams.update(FONT)
    figure, panels = plt.subplots(
        rows, columns, figsize=(max(5.0, 4.1 * columns), height), squeeze=False, layout="constrained"
    )
    return figure, panels


def _style(mode: str) -> dict:
    return {**STYLES[mode], "linewidth": 2.4 if mode == "lagged" else 1.7, "markersize": 6}


def _logarithmic(axis, scale: Callable[[str], None]) -> None:
    scale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(plain)
    low, high = axis.get_view_interval()
    ticks = [m * 10**e for e in range(-1, 6) for m in (1, 2, 3, 5, 7) if low <= m * 10**e <= high]
    axis.set_ticks(ticks)
    axis.set_minor_formatter(NullFormatter())


def _save(figure, panels: Sequence[Sequence[Axes]], path: Path) -> None:
    for row in panels:
        for axes in row:
            axes.grid(True, color="#dddddd", linewidth=0.7)
            axes.set_axisbelow(True)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(figure)


def draw(rows: Sequence[dict], folder: Path) -> None:
    """Both pictures of rows of one path."""
    for name, picture in (("pareto", draw_pareto), ("budget", draw_budget)):
        picture(rows, folder / f"{name}.png")
        print(f"written: {folder / name}.png")


@app.command()
def main(
    bench: Annotated[Path, typer.Option(help="rows of python -m benchmarks.bench")] = Path("build/bench.json"),
    out: Path = Path("docs/images"),
    temperature: float = 0.0,
) -> None:
    """Draws both pictures from the rows measured in process."""
    rows = [r for r in read(bench)[0] if r["path"] == "in_process" and r["temperature"] == temperature]
    if not rows:
        bundles.fail(f"{bench} holds no row measured in process at temperature {temperature:g}; run make bench first.")
    draw(rows, out)


if __name__ == "__main__":
    app()
