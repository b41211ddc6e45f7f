"""Sequential Temperature Scaling of the confidence head (paper, section 3.2.1), fitted and judged on recorded rollouts.

Knows: the fit, the report. Refuses to know: how rollouts were made, bundles, pictures (reliability.py draws them).

Legend: B rounds, G block size (slots of a round), K bins, T grid of temperatures. A round's `logits` [B, G] are the raw
confidence logits z; `accepted` [B] counts the leading accepted tokens of a fully verified block, so slot k (from 0)
survived iff accepted > k, which is what the running product of sigmoid(z_i / T_i), i <= k, predicts.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from numpy import ndarray

from training.rollouts import Rollouts
from training.scores import BINNINGS, auc, brier, ece, sigmoid, survival

# 121 temperatures in equal ratios (3.5% apart) from 1/8 to 8; 1.0 is one of them.
GRID = np.exp(np.linspace(-np.log(8.0), np.log(8.0), 121))
SLACK = 0.1  # in units of 1 / sqrt(rounds): about a fifth of the deviation of an observed share near one half
LARGEST_BIAS = 4.0
FEWEST_SURVIVORS = 20  # of a position, to fit it at all
FEWEST_ROUNDS = 200  # of one temperature, on each side of the split


def fit(rollouts: Rollouts, *, offset: bool = False, binning: str = "mass") -> tuple[ndarray, ndarray]:
    """([G] temperatures, [G] biases) by STS: for k from left to right, the T_k of GRID that minimises the ECE of the
    running product at k against "the first k + 1 tokens were all accepted", everything before k frozen.

    Temperatures whose ECE lies within the fit's resolution (SLACK / sqrt(B)) of the least count as equal and the one
    nearest to 1 is taken: a position that says nothing, or has under FEWEST_SURVIVORS survivors, stays as it is.
    offset: each T_k is tried with the bias b_k that makes the mean of the product equal to the observed share of
    survivors (else the biases are 0): a 1D search still.
    """
    prefix, temperatures, biases = np.ones(len(rollouts)), [], []
    grid = GRID[np.argsort(np.abs(np.log(GRID)), kind="stable")]  # from 1 outwards
    for z, survived in zip(rollouts.logits.T, rollouts.survived.T):
        if survived.sum() < FEWEST_SURVIVORS:
            temperatures.append(1.0)
            biases.append(0.0)
            prefix = prefix * sigmoid(z)
            continue
        scaled = z / grid[:, None]  # [T, B]
        bias = matching_bias(scaled, prefix, float(survived.mean())) if offset else np.zeros(len(grid))
        candidates = prefix * sigmoid(scaled + bias[:, None])
        errors = ece(candidates, survived, binning)
        best = int(np.argmax(errors <= errors.min() + SLACK / np.sqrt(len(rollouts))))
        temperatures.append(grid[best])
        biases.append(bias[best])
        prefix = candidates[best]
    return np.array(temperatures), np.array(biases)


def matching_bias(scaled: ndarray, prefix: ndarray, observed: float) -> ndarray:
    """[T] biases b for which mean(prefix * sigmoid(scaled + b)) is `observed`, within -LARGEST_BIAS..LARGEST_BIAS, by
    bisection (the mean grows with b); scaled [T, B], prefix [B]."""
    low, high = np.full(len(scaled), -LARGEST_BIAS), np.full(len(scaled), LARGEST_BIAS)
    for _ in range(20):
        middle = (low + high) / 2
        under = (prefix * sigmoid(scaled + middle[:, None])).mean(axis=1) < observed
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return (low + high) / 2


def split(rollouts: Rollouts, seed: int = 0) -> tuple[Rollouts, Rollouts]:
    """Two halves of the requests (not of the rounds: rounds of one text resemble each other)."""
    requests = np.random.default_rng(seed).permutation(np.unique(rollouts.request))
    first = np.isin(rollouts.request, requests[: len(requests) // 2])
    return rollouts.where(first), rollouts.where(~first)


# -- the report -------------------------------------------------------------------------------------------------------


def measure(
    rollouts: Rollouts, temperatures: ndarray, bias: ndarray | float = 0.0, *, draws: int = 200, seed: int = 0
) -> dict:
    """Everything about one set of temperatures on `rollouts`, a list of G numbers a key.

    ece, ece_width (the two binnings), ece_low / ece_high (90% interval over `draws` resamples of whole requests),
    noise (mean ECE that a perfectly calibrated predictor of the same predictions would show in as many rounds: what is
    left of an ECE near it is no miscalibration), noise_high (its 95th percentile), auc, brier, predicted, observed
    (means).
    """
    p, y = survival(rollouts.logits, temperatures, bias), rollouts.survived
    rng = np.random.default_rng(seed)
    _, request = np.unique(rollouts.request, return_inverse=True)
    members = [np.flatnonzero(request == r) for r in range(request.max() + 1)]
    resampled, ideal = [], []
    for _ in range(draws):
        rows = np.concatenate([members[r] for r in rng.integers(0, len(members), len(members))])
        resampled.append(ece(p[rows].T, y[rows].T))
        ideal.append(ece(p.T, (rng.random(p.shape) < p).T))
    low, high = np.percentile(resampled, [5, 95], axis=0)
    return {
        "ece": ece(p.T, y.T).tolist(), "ece_width": ece(p.T, y.T, "width").tolist(), "ece_low": low.tolist(),
        "ece_high": high.tolist(), "noise": np.mean(ideal, axis=0).tolist(),
        "noise_high": np.percentile(ideal, 95, axis=0).tolist(), "auc": [auc(a, b) for a, b in zip(p.T, y.T)],
        "brier": [brier(a, b) for a, b in zip(p.T, y.T)],
        "predicted": p.mean(0).tolist(), "observed": y.mean(0).tolist(),
    }  # fmt: skip


def calibrate(rollouts: Rollouts, *, offset: bool = True, seed: int = 0, command: str = "") -> dict:
    """Temperatures (and, with `offset`, biases) for sampled and for greedy requests, each fitted on half of its
    requests and judged on the other half.

    Returns the manifest's `calibration` (date, command, draft_hash, target_hash, rounds, sampled [G], greedy [G], bias
    {sampled, greedy: [G]} only with `offset`, ece_before and ece_after {sampled, greedy: [G]}) and `report` {sampled,
    greedy: {fitted, held_out: rounds, requests, before, temperature_only (the paper's STS), after: see measure(),
    finding}, rollouts: the recording's meta}. Raises ValueError when a temperature has too few rounds.
    """
    calibration = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": command,
        "draft_hash": rollouts.meta["draft_hash"], "target_hash": rollouts.meta["target_hash"], "rounds": len(rollouts),
    }  # fmt: skip
    report, before, after, bias = {"rollouts": rollouts.meta}, {}, {}, {}
    for name, group in groups(rollouts).items():
        fitted, held_out = split(group, seed)
        if min(len(fitted), len(held_out)) < FEWEST_ROUNDS:
            what = "temperature 0" if name == "greedy" else "temperatures above 0"
            raise ValueError(
                f"the rollouts hold {len(fitted)} and {len(held_out)} rounds at {what} in the two halves; each half "
                f"needs {FEWEST_ROUNDS} or more: record more, with --temperature 0,1."
            )
        plain, none = fit(fitted)
        temperatures, b = fit(fitted, offset=True) if offset else (plain, none)
        sides = {"before": (np.ones_like(plain), none), "temperature_only": (plain, none), "after": (temperatures, b)}
        measured = {side: measure(held_out, *values, seed=seed) for side, values in sides.items()}
        calibration[name], bias[name] = ([round(float(v), 4) for v in values] for values in (temperatures, b))
        before[name], after[name] = (_rounded(measured[side]["ece"]) for side in ("before", "after"))
        report[name] = {
            "fitted": len(fitted), "held_out": len(held_out), "requests": len(np.unique(group.request)),
            **{side: {k: _rounded(v) for k, v in values.items()} for side, values in measured.items()},
            "finding": finding(measured["temperature_only"], measured["after"]),
        }  # fmt: skip
    if offset:
        calibration["bias"] = bias
    return {**calibration, "ece_before": before, "ece_after": after, "report": report}


def groups(rollouts: Rollouts) -> dict[str, Rollouts]:
    """The rounds of sampled (temperature > 0) and of greedy requests: they get temperatures of their own."""
    return {name: rollouts.where((rollouts.temperature > 0) == (name == "sampled")) for name in ("sampled", "greedy")}


def finding(temperature_only: dict, after: dict) -> str:
    """One or two sentences on what temperatures alone leave, and what is left in the end."""
    parts, ece_alone = [], np.array(temperature_only["ece"])
    k = int(np.argmax(ece_alone - temperature_only["noise_high"]))
    shift = temperature_only["predicted"][k] - temperature_only["observed"][k]
    if ece_alone[k] > temperature_only["noise_high"][k] and abs(shift) > ece_alone[k] / 2:
        parts.append(
            f"Temperatures alone leave an offset at position {k + 1} "
            f"({temperature_only['predicted'][k]:.1%} predicted, {temperature_only['observed'][k]:.1%} observed): "
            "logits near 0 stay where they are at any temperature."
        )
    mean, noise = np.mean(after["ece"]), np.mean(after["noise"])
    over = [i + 1 for i, (e, n) in enumerate(zip(after["ece"], after["noise_high"])) if e > n]
    parts.append(
        f"After calibration the mean ECE is {mean:.2%}; a perfectly calibrated head would show {noise:.2%} on as many "
        "rounds, "
        + (
            f"and more than chance is left at position {', '.join(map(str, over))}."
            if over
            else "so nothing is left to see."
        )
    )
    return " ".join(parts)


def write(result: dict, file: Path) -> None:
    """Writes calibration.json (beside, then renamed)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(file)


def table(result: dict) -> str:
    """A text for the terminal: by position what was fitted, ECE before, with temperatures alone and after (90%
    interval), what a perfect head would show, AUC and Brier."""
    lines = []
    for name in ("sampled", "greedy"):
        report = result["report"][name]
        before, alone, after = (report[side] for side in ("before", "temperature_only", "after"))
        bias = result.get("bias", {}).get(name, [0.0] * len(result[name]))
        lines.append(
            f"{name}: fitted on {report['fitted']:,} rounds, judged on {report['held_out']:,} of other requests"
        )
        lines.append(
            "  position      T    bias  ECE raw  T only   after (90% interval)  perfect    AUC  Brier raw  after"
        )
        for k, t in enumerate(result[name]):
            score = float("nan") if after["auc"][k] is None else after["auc"][k]
            lines.append(
                f"  {k + 1:8d} {t:6.2f} {bias[k]:7.2f} {before['ece'][k]:8.2%} {alone['ece'][k]:7.2%} "
                f"{after['ece'][k]:7.2%} ({after['ece_low'][k]:5.2%}-{after['ece_high'][k]:6.2%}) "
                f"{after['noise'][k]:8.2%} {score:6.3f} {before['brier'][k]:10.4f} {after['brier'][k]:6.4f}"
            )
        means = [np.mean(side["ece"]) for side in (before, alone, after)]
        lines.append(
            f"      mean {'':14s} {means[0]:8.2%} {means[1]:7.2%} {means[2]:7.2%} "
            f"{'':15s} {np.mean(after['noise']):7.2%}"
        )
        lines.append(f"  {report['finding']}")
    return "\n".join(lines)


def _rounded(values: list[float]) -> list[float | None]:
    """Five digits; None (JSON has no nan) where a measure is not defined."""
    return [None if np.isnan(v) else round(float(v), 5) for v in values]
