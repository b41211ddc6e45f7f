"""What the verify engine costs for each kind of request: ms a call, on random logits, at several numbers of requests.

Knows: the verify engine's batch. Refuses to know: the target, schedulers, what a verdict is for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import numpy as np
import typer

from decoding.random import gumbel
from engines.base import VerifyBatch

from . import bundle as bundles
from .common import console_for_tables, rich_table, write_result

TITLE = "Verify: ms of a round, whole blocks (n = G), random logits; {rounds} interleaved rounds, medians"
KINDS = (
    "greedy",
    "greedy + log-probs",
    "greedy + 200 edits",
    "rejection",
    "rejection + top_p",
    "coupled",
    "coupled + top_p",
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def batch(bundle, kind: str, R: int, rng: np.random.Generator) -> VerifyBatch:
    """R requests of `kind` with G draft tokens each, their logits flat enough for a nucleus of some dozen tokens."""
    G, V, V_d = bundle.draft.block_size, bundle.target.vocab_size, bundle.draft.vocab_size
    M, f32 = R * (G + 1), np.float32
    logits = rng.standard_normal((M, V), f32)
    logits[:, :40] += 12
    rows, every, requests = np.arange(M).reshape(R, G + 1), np.arange(M), np.arange(R)
    b = VerifyBatch.greedy(logits, rows, rng.integers(0, V_d, (R, G)), np.full(R, G), V_d)
    if kind == "greedy + log-probs":
        at = np.stack([every // (G + 1), every % (G + 1)], axis=1)
        return replace(b, log_prob_rows=every, log_prob_at=at)
    if kind == "greedy":
        return b
    b = replace(b, wide_rows=every, temperature=np.ones(M, f32))
    if "edits" in kind:
        edits = np.arange(min(200, V))
        at = np.stack([every.repeat(len(edits)), np.tile(edits, M)], axis=1)
        ones = np.ones(len(at), f32)
        return replace(
            b, match_rows=every, noise=np.zeros((M, V), f32), edit_at=at, edit_scale=1.2 * ones, edit_add=-ones
        )
    if "coupled" in kind:
        b = replace(b, match_rows=every, noise=np.stack([gumbel(0, i, np.empty(V, f32)) for i in every]))
    else:
        q = rng.random((R, G, V_d), f32)
        b = replace(
            b, sample_index=requests, sample_rows=rows, draft_rows=requests, draft_indices=rng.integers(0, V_d, (R, G)),
            draft_probs=q / q.sum(-1, keepdims=True), accept_uniforms=rng.random((R, G), f32),
            next_uniforms=rng.random((R, G + 1), f32),
        )  # fmt: skip
    if "top_p" in kind:
        matched = every if "coupled" in kind else every[:0]
        b = replace(
            b, filter_rows=every, top_k=np.full(M, V), top_p=np.full(M, 0.9, f32), min_p=np.zeros(M, f32),
            top_count=np.array([min(64, V)]), match_filtered=matched,
        )  # fmt: skip
    return b


@app.command()
def main(
    bundle: Path = bundles.BUNDLE,
    requests: Annotated[str, typer.Option(help="requests of a round")] = "1,4,16",
    rounds: int = 15,
    out: Path = Path("build/verdicts.json"),
) -> None:
    """Times every kind in turn, in calls of at most the engine's verify_rows rows, as the judge makes them."""
    opened, rng, rows = bundles.load(bundle), np.random.default_rng(0), []
    counts, slots = [int(r) for r in requests.split(",")], opened.bundle.draft.block_size + 1
    most = max(1, (opened.verify_rows or 1 << 30) // slots)
    for R in counts:
        calls = {}
        for kind in KINDS:
            size = R if kind.startswith("greedy") and "edits" not in kind else min(R, most)
            calls[kind] = [batch(opened.bundle, kind, size, rng), *([None] * (-(-R // size) - 1))]
        spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for i in range(rounds + 2):
            for kind, (first, *again) in calls.items():
                started = perf_counter()
                for _ in range(1 + len(again)):
                    result = opened.verify(first)
                if i >= 2:
                    spent[kind].append(1e3 * (perf_counter() - started))
                assert result.complete.all()
        for kind in KINDS:
            rows.append(
                {
                    "requests": R,
                    "kind": kind,
                    "ms": median(spent[kind]),
                    "us_a_row": 1e3 * median(spent[kind]) / (R * slots),
                }
            )
    console = console_for_tables()
    columns = (
        ("requests", lambda r: str(r["requests"])), ("kind", lambda r: r["kind"]), ("ms", lambda r: f"{r['ms']:.2f}"),
        ("us a row", lambda r: f"{r['us_a_row']:.0f}"),
    )  # fmt: skip
    console.print(rich_table(TITLE.format(rounds=rounds), columns, rows))
    write_result(out, {"bundle": str(bundle), "rows": rows})
    console.print(f"written: {out}", soft_wrap=True)


if __name__ == "__main__":
    app()
