"""The verify step in float64 numpy, row by row: what the engine's answers are held against.

Knows: edits, filters and accept rules (docs/sampling.md). Refuses to know: ONNX, speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray


def softmax(x: ndarray) -> ndarray:
    """Over the last axis, float64."""
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def edit(row: ndarray, tokens: ndarray, scale: ndarray, add: ndarray) -> ndarray:
    """row [V] with l -> (l / scale if l > 0 else l * scale) + add at `tokens`."""
    row = row.astype(np.float64)
    old = row[tokens]
    row[tokens] = np.where(old > 0, old / scale, old * scale) + add
    return row


def keep(p: ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> ndarray:
    """p [V] -> bool [V]: what top_k, then top_p of the rest renormalised, then min_p leave; by value, ties together."""
    kept = np.ones(len(p), bool)
    if top_k:
        kept &= p >= np.sort(p)[-min(top_k, len(p))]
    if top_p < 1:
        mass = p[kept].sum()
        above = np.array([p[kept & (p > x)].sum() for x in p]) if len(p) <= 256 else _mass_above(p, kept)
        kept &= above < top_p * mass
    return kept & (p >= min_p * p.max())


def _mass_above(p: ndarray, kept: ndarray) -> ndarray:
    order = np.argsort(-p, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(np.where(kept, p, 0)[order])])
    first = np.searchsorted(-p[order], -p, side="left")  # where the run of equals begins
    return before[first]


@dataclass(frozen=True)
class Verdict:
    """accepted [R], the interval [low, high] [R] of allowed next tokens (one token, unless the uniform lies within the
    tolerance of a step of the cdf, which float32 may round either way), log_probs [Ml]."""

    accepted: ndarray
    low: ndarray
    high: ndarray
    log_probs: ndarray


def verify_reference(feeds: dict[str, ndarray], draft_to_target: ndarray, tolerance: float = 1e-5) -> Verdict:
    """`feeds` as the engine's inputs (top_count is not looked at)."""
    f = feeds
    R, V, G = len(f["num_draft"]), f["logits"].shape[-1], f["draft_tokens"].shape[1]
    scores = []
    for w, row in enumerate(f["wide_rows"]):
        mine = f["edit_at"][:, 0] == w
        edited = edit(f["logits"][row], f["edit_at"][mine, 1], f["edit_scale"][mine], f["edit_add"][mine])
        scores.append(edited.clip(-1e30, 1e30) / f["temperature"][w])
    probs = [softmax(x) for x in scores]
    allowed = [np.ones(V, bool) for _ in scores]
    for w, top_k, top_p, min_p in zip(f["filter_rows"], f["top_k"], f["top_p"], f["min_p"]):
        allowed[w] = keep(probs[w], int(top_k), float(top_p), float(min_p))
        probs[w] = np.where(allowed[w], probs[w], 0) / probs[w][allowed[w]].sum()

    top = f["logits"].argmax(-1)
    for w, noise in zip(f["match_rows"], f["noise"]):
        top[f["wide_rows"][w]] = np.where(allowed[w], scores[w] + noise, -np.inf).argmax()
    accepted, low, high = (np.zeros(R, np.int64) for _ in range(3))
    drawn = {int(r): i for i, r in enumerate(f["sample_index"])}
    for r in range(R):
        n, a, x = int(f["num_draft"][r]), 0, f["draft_tokens"][r]
        if r not in drawn:
            best = top[f["row_index"][r]]
            while a < n and x[a] == best[a]:
                a += 1
            accepted[r], low[r], high[r] = a, best[a], best[a]
            continue
        i = drawn[r]
        p, q = [probs[w] for w in f["sample_rows"][i]], f["draft_probs"][f["draft_rows"][i]]
        while a < n and f["accept_uniforms"][i, a] * q[a, f["draft_indices"][i, a]] < p[a][x[a]]:
            a += 1
        weights = p[a].copy()
        if a < n:
            weights[draft_to_target] -= q[a]
            weights = weights.clip(min=0)
            weights = weights if weights.sum() > 0 else p[a]
        cdf = weights.cumsum() / weights.sum()
        last = int(np.flatnonzero(weights)[-1])
        draw = lambda u: min(int((cdf <= u).sum()), last)
        accepted[r] = a
        low[r], high[r] = (draw(f["next_uniforms"][i, a] + d) for d in (-tolerance, tolerance))

    following = low
    values = np.zeros(len(f["log_prob_rows"]))
    for k, (row, (r, slot)) in enumerate(zip(f["log_prob_rows"], f["log_prob_at"])):
        token = f["draft_tokens"][r, slot] if slot < accepted[r] else following[r]
        values[k] = np.log(softmax(f["logits"][row])[token])
    return Verdict(accepted, low, high, values)


def draw_errors(probs: ndarray, uniforms: ndarray, indices: ndarray, tolerance: float = 1e-5) -> ndarray:
    """[Rs, G] int64, 1 where a uniform lies outside its index's cdf interval (widened by the tolerance, because float32
    sums differ by their order)."""
    cdf = probs.astype(np.float64).cumsum(-1)
    take = lambda a: np.take_along_axis(a, indices[..., None], -1)[..., 0]
    high, mass = take(cdf), take(probs.astype(np.float64))
    u = uniforms * cdf[..., -1]
    return ((u < high - mass - tolerance) | (u > high + tolerance)).astype(np.int64)


def pick_errors(scores: ndarray, indices: ndarray, tolerance: float = 1e-5) -> ndarray:
    """[R, G] int64, 1 where the index's score is under the largest."""
    chosen = np.take_along_axis(scores, indices[..., None], -1)[..., 0]
    return (chosen < scores.max(-1) - tolerance * np.abs(scores).max()).astype(np.int64)
