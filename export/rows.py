"""Operations over long rows that are exact in float32, fast, and give a row the same bits in every batch.

Knows: one row of a vocabulary's width. Refuses to know: what the row means.

A long row is cut into runs near its square root. A float32 running sum over a whole vocabulary would lose the tail;
ONNX Runtime's ArgMax costs six times its ReduceMax, and gives an empty batch a wrong shape (TopK does not).
"""

from __future__ import annotations

import numpy as np

from .graph import Graph

SHORT_ROW = 1024  # up to here a float32 running sum is exact enough to draw from, and an argmax cheap
LOWEST = float(np.finfo(np.float32).min)


def argmax(g: Graph, x: str, size: int) -> str:
    """x [R, size] -> [R, 1] int64: the first of the largest."""
    first = lambda values: g.op("TopK", values, g.const([1]), out=2, axis=-1, largest=1, sorted=1)[1]
    if size <= SHORT_ROW:
        return first(x)
    run, runs = in_runs(g, x, size, LOWEST)
    chosen = first(g.op("ReduceMax", runs, g.const([2]), keepdims=0))
    return g.op("Add", g.op("Mul", chosen, g.const(run)), first(g.op("GatherND", runs, chosen, batch_dims=1)))


def inverse_cdf(g: Graph, weights: str, uniform: str, size: int) -> str:
    """weights [R, size] >= 0 (any positive total), uniform [R, 1] in [0, 1) -> [R, 1] int64, drawn in proportion.

    Over one level it is the count of cdf <= u * cdf_last. A float32 running sum over a whole vocabulary would lose the
    tail (terms under half an ulp of the sum), so a long row is drawn in two levels: a run of tokens by the runs' sums,
    then a token in the run by what is left of the uniform. The chosen index always has a weight above zero.
    """
    if size <= SHORT_ROW:
        return draw(g, weights, uniform, size)[0]
    run, runs = in_runs(g, weights, size, 0.0)
    sums = g.op("ReduceSum", runs, g.const([2]), keepdims=0)  # [R, size / run]
    chosen, target, below, cdf = draw(g, sums, uniform, -(-size // run))
    before = g.op("ReduceMax", g.op("Where", below, cdf, g.const(0.0, "float32")), g.const([1]), keepdims=1)
    left = g.op("Div", g.op("Sub", target, before), g.op("GatherElements", sums, chosen, axis=1))
    left = g.op("Clip", left, g.const(0.0, "float32"), g.const(1 - 2.0**-23, "float32"))
    inside = draw(g, g.op("GatherND", runs, chosen, batch_dims=1), left, run)[0]
    return g.op("Add", g.op("Mul", chosen, g.const(run)), inside)


def in_runs(g: Graph, x: str, size: int, fill: float) -> tuple[int, str]:
    """x [R, size] -> (run length, [R, size / run, run], the last run filled up)."""
    run = run_length(size)
    if size % run:
        x = g.op("Pad", x, g.const([0, 0, 0, -size % run]), g.const(fill, "float32"))
    return run, g.reshape(x, -1, -(-size // run), run)  # -1 first: R may be 0


def row_total(g: Graph, weights: str, size: int) -> str:
    """weights [R, size] -> their sum [R, 1], the same bits wherever the row lies in memory."""
    if size > SHORT_ROW:
        run, runs = in_runs(g, weights, size, 0.0)
        weights, size = g.op("ReduceSum", runs, g.const([2]), keepdims=0), -(-size // run)
    return g.op("Gather", g.op("CumSum", weights, g.const(1)), g.const([size - 1]), axis=1)


def draw(g: Graph, weights: str, uniform: str, size: int) -> tuple[str, str, str, str]:
    """One level: (index [R, 1] int64, u * cdf_last [R, 1], cdf <= that [R, size] bool, cdf [R, size])."""
    cdf = g.op("CumSum", weights, g.const(1))
    target = g.op("Mul", uniform, g.op("Gather", cdf, g.const([size - 1]), axis=1))
    below = g.op("LessOrEqual", cdf, target)
    count = g.op("ReduceSum", g.op("Cast", below, to=6), g.const([1]), keepdims=1)  # int32
    return g.op("Cast", g.op("Min", count, g.const(size - 1, "int32")), to=7), target, below, cdf


def run_length(size: int) -> int:
    """How many tokens one run has: near the row's square root, dividing the row if it can. A multiple of 16, so that
    every run of every row starts at the same alignment and a vectorised sum adds in the same order."""
    root = max(16, int(size**0.5) // 16 * 16)
    return next((n for n in range(root, 8 * root, 16) if size % n == 0), root)
