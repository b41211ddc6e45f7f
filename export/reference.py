"""The verify step in float64 numpy: what the engine's answers are held against.

Knows: the accept rule and the residual (docs/structures.md). Refuses to know: ONNX.
"""

from __future__ import annotations

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def verify_reference(
    logits, row_index, draft_tokens, draft_indices, draft_probs, num_draft, temperature, sample_index, accept_uniforms,
    next_uniforms, draft_to_target, tolerance: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arguments as the engine's inputs. Returns accepted [R] and the interval [low, high] [R] of allowed next tokens: one
    token, unless the uniform lies within `tolerance` of a step of the cdf, which float32 may round either way."""
    R, V = len(num_draft), logits.shape[-1]
    accepted, low, high = (np.zeros(R, np.int64) for _ in range(3))
    sampled = set(np.asarray(sample_index).tolist())
    for r in range(R):
        rows = logits[row_index[r]]
        n, a = int(num_draft[r]), 0
        if r not in sampled:
            best = rows.argmax(-1)
            while a < n and draft_tokens[r, a] == best[a]:
                a += 1
            accepted[r], low[r], high[r] = a, best[a], best[a]
            continue
        p = softmax(rows / temperature[r])
        while a < n and accept_uniforms[r, a] * draft_probs[r, a, draft_indices[r, a]] < p[a, draft_tokens[r, a]]:
            a += 1
        weights = p[a].copy()
        if a < n:
            weights[draft_to_target] -= draft_probs[r, a]
            weights = weights.clip(min=0)
            weights = weights if weights.sum() > 0 else p[a]
        cdf = weights.cumsum() / weights.sum()
        draw = lambda u: min(int((cdf <= u).sum()), V - 1)
        accepted[r], low[r], high[r] = a, draw(next_uniforms[r, a] - tolerance), draw(next_uniforms[r, a] + tolerance)
    return accepted, low, high
