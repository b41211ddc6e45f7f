"""Measures of calibration: what was predicted against what came of it.

Knows: numpy. Refuses to know: where the predictions come from. Legend: B rounds, G block size, K bins.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

BINNINGS = {"mass": 15, "width": 10}  # equal-mass bins are what is fitted and reported first; see ece()


def ece(predicted: ndarray, observed: ndarray, binning: str = "mass") -> ndarray:
    """Expected calibration error: sum over bins of (bin's share) * |mean predicted - mean observed|.

    predicted [..., B] in [0, 1], observed [B] or [..., B] (0/1) -> [...]. The paper names Naeini et al. (2015) and no
    binning. "mass": 15 bins of (nearly) as many rounds each, in the order of the prediction (ties in the order given);
    "width": 10 bins of width 0.1, the last one closed.
    """
    p = np.asarray(predicted, np.float64)
    y = np.broadcast_to(np.asarray(observed, np.float64), p.shape)
    difference, B, K = p - y, p.shape[-1], BINNINGS[binning]
    if binning == "mass":
        order = np.argsort(p, axis=-1, kind="stable")
        edges = np.unique(np.arange(K) * B // K)  # fewer bins than rounds
        sums = np.add.reduceat(np.take_along_axis(difference, order, -1), edges, axis=-1)
    else:
        flat = difference.reshape(-1, B)
        bins = np.minimum((p.reshape(-1, B) * K).astype(np.int64), K - 1) + K * np.arange(len(flat))[:, None]
        sums = np.bincount(bins.ravel(), flat.ravel(), K * len(flat)).reshape(*p.shape[:-1], K)
    return np.abs(sums).sum(axis=-1) / B


def auc(predicted: ndarray, observed: ndarray) -> float:
    """Chance that a surviving round was predicted higher than one that did not survive (ties count half); nan when
    there is only one of them."""
    y = np.asarray(observed, bool)
    positive, negative = int(y.sum()), int((~y).sum())
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each value, from 1
    return float((ranks[inverse][y].sum() - positive * (positive + 1) / 2) / (positive * negative))


def brier(predicted: ndarray, observed: ndarray) -> float:
    """Mean squared difference of prediction and outcome."""
    return float(np.mean((np.asarray(predicted, np.float64) - np.asarray(observed, np.float64)) ** 2))


def survival(logits: ndarray, temperatures: ndarray, bias: ndarray | float = 0.0) -> ndarray:
    """[B, G] running product of sigmoid(z / T + b); temperatures, bias [G]."""
    return np.cumprod(sigmoid(logits / np.asarray(temperatures) + bias), axis=-1)


def sigmoid(x: ndarray) -> ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
