"""The reliability diagram: predicted against observed survival by position, before and after calibration.

Knows: how calibration looks on paper. Refuses to know: how it is fitted (calibrate.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy import ndarray

from training.calibrate import groups, split
from training.rollouts import Rollouts
from training.scores import BINNINGS, survival

LIMITS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of a panel's two axes
BEFORE, AFTER = "#c2571a", "#1f5fa8"


def curve(predicted: ndarray, observed: ndarray, bins: int = BINNINGS["mass"]) -> tuple[ndarray, ndarray]:
    """Mean prediction and mean outcome of equal-mass bins, the bins of the reported ECE: two arrays of at most
    `bins`."""
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return np.array([predicted[p].mean() for p in parts]), np.array([observed[p].mean() for p in parts])


def draw(rollouts: Rollouts, result: dict, file: Path, seed: int = 0) -> None:
    """Writes a PNG with a row for sampled and one for greedy requests and a column a position, from the held-out
    half."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    G = rollouts.logits.shape[1]
    figure = Figure(figsize=(2.5 * G + 0.6, 6.2), layout="constrained", dpi=110)
    axes = figure.subplots(2, G, squeeze=False)
    for row, (name, group) in zip(axes, groups(rollouts).items()):
        held_out, report = split(group, seed)[1], result["report"][name]
        sides = {"before": (np.ones(G), 0.0), "after": (result[name], result.get("bias", {}).get(name, 0.0))}
        predicted = {side: survival(held_out.logits, np.array(t), np.array(b)) for side, (t, b) in sides.items()}
        for k, axis in enumerate(row):
            curves = {side: curve(p[:, k], held_out.survived[:, k]) for side, p in predicted.items()}
            most = max(max(x.max(), y.max()) for x, y in curves.values())
            limit = next(size for size in LIMITS if size >= min(1.05 * most, 1.0))
            share, edges = np.histogram(predicted["after"][:, k], 20, (0, limit))
            axis.bar(
                edges[:-1], 0.9 * limit * share / max(share.max(), 1), limit / 20, align="edge", color="0.9", zorder=0
            )
            axis.plot([0, 1], [0, 1], color="0.6", lw=0.8, zorder=1)
            for side, colour in (("before", BEFORE), ("after", AFTER)):
                axis.plot(*curves[side], "o-", color=colour, ms=3, lw=1.2, label=side)
            before, after = (report[side]["ece"][k] for side in ("before", "after"))
            axis.set_title(f"{name}, position {k + 1}\nECE {before:.1%} → {after:.1%}", fontsize=9)
            axis.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
            axis.tick_params(labelsize=7)
        row[0].set_ylabel("observed survival", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("predicted survival", fontsize=8)
    axes[0][0].legend(fontsize=7, loc="upper left")
    meta = rollouts.meta
    figure.suptitle(
        f"Reliability of the confidence head, {meta.get('bundle', '')}: rounds not used for the fit; grey: how the "
        "predictions are spread (after, scaled); axes differ", fontsize=9,
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
