"""The picture of an SPS table: steps a second against batch tokens, and what a draft costs.

Knows: the manifest's `sps`. Refuses to know: how it was measured, who schedules by it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(sps: dict[str, Any], file: Path, title: str = "") -> None:
    """Writes a PNG: one panel a context (a line for each number of requests, 10th to 90th percentile as band), and one
    of the draft. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts, requests = sps["contexts"], sps["requests"]
    figure, panels = pyplot.subplots(
        1, len(contexts) + 1, figsize=(4.2 * (len(contexts) + 1), 3.8), layout="constrained"
    )
    colors = dict(zip(requests, pyplot.cm.viridis([0.9 * i / max(len(requests) - 1, 1) for i in range(len(requests))])))
    for panel, context in zip(panels, contexts):
        for r in requests:
            points = sorted((p for p in sps["target"] if (p["requests"], p["context"]) == (r, context)), key=_tokens)
            x = [p["tokens"] for p in points]
            low, mid, high = ([1e3 / p[key] for p in points] for key in ("high", "ms", "low"))
            panel.fill_between(x, low, high, color=colors[r], alpha=0.25, linewidth=0)
            panel.plot(x, mid, ".-", color=colors[r], markersize=4, linewidth=1, label=f"{r} request{'s' * (r > 1)}")
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="batch tokens",
            ylabel="steps/s",
            title=f"target + verify, context {context}",
        )
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    for context in contexts:
        points = sorted((p for p in sps["draft"] if p["context"] == context), key=lambda p: p["requests"])
        x = [p["requests"] for p in points]
        panels[-1].fill_between(x, [p["low"] for p in points], [p["high"] for p in points], alpha=0.25, linewidth=0)
        panels[-1].plot(x, [p["ms"] for p in points], ".-", label=f"context {context}")
    panels[-1].set(xlabel="requests", ylabel="ms", title="draft", ylim=(0, None))
    panels[-1].legend(fontsize=7)
    panels[-1].grid(alpha=0.3)
    where = f"{sps['hardware']['cpu']}, {sps['threads']} threads, {sps['date'][:10]}"
    figure.suptitle(f"{title}  ({where}; band: 10th to 90th percentile)".strip(), fontsize=9)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _tokens(point: dict) -> int:
    return point["tokens"]
