"""The verify engine's graph: rejection sampling or coupled matching of a block against the target's logits.

Knows: edits, filters, the accept rules, the residual and the log-probs (docs/sampling.md), all in float32.
Refuses to know: models, batching, where an edit comes from.

A row of logits that is neither edited, sampled, coupled nor asked for its log-probs costs an ArgMax. Everything else is
packed: the lists (wide rows, edits, filters, matches, samples, log-probs) may each be empty and then cost nothing.
Every op works row by row and gives a row the same bits wherever it lies in the batch: where a row is summed, it is
summed in runs of a fixed alignment, because a vectorised sum depends on where its row starts.

Legend: M rows of logits, R requests, G block size, V / V_d target / draft vocabulary, Mw wide rows, E edits, Mf
filtered, Mc matched and Ml log-prob rows, Rs requests of the rejection rule, Rq rows of draft_probs, K the TopK's
count.
"""

from __future__ import annotations

import numpy as np

from .graph import Graph
from .rows import LOWEST, argmax, inverse_cdf, row_total

LIMIT = 1e30  # an edited logit's largest magnitude: a ban, and safe to divide by any temperature


def build_verify(block_size: int, vocab_size: int, draft_to_target: np.ndarray) -> Graph:
    """draft_to_target [V_d]: target id of each draft token. Probability outside it is 0 under the draft."""
    g, G, V = Graph("verify"), block_size, vocab_size
    logits = g.input("logits", "float32", ("M", V))
    row_index = g.input("row_index", "int64", ("R", G + 1))
    draft_tokens = g.input("draft_tokens", "int64", ("R", G))
    num_draft = g.op("Unsqueeze", g.input("num_draft", "int64", ("R",)), g.const([1]))  # [R, 1]
    wide_rows = g.input("wide_rows", "int64", ("Mw",))
    scores, p = wide_scores(g, logits, wide_rows, V)
    threshold, kept = filters(g, p, wide_rows, V)

    top = argmax(g, logits, V)  # [M, 1]
    top = matches(g, top, wide_rows, scores, p, threshold, V)
    top = g.op("Gather", g.op("Squeeze", top, g.const([1])), row_index)  # [R, G+1]
    fail = g.op("Not", g.op("Equal", draft_tokens, first_slots(g, top, G)))
    accepted = first_failure(g, fail, num_draft, G)  # [R, 1]
    following = g.op("GatherElements", top, accepted, axis=1)  # [R, 1]

    sample_index = g.input("sample_index", "int64", ("Rs",))
    sampled = rejection(g, p, threshold, kept, draft_tokens, num_draft, sample_index, G, V, draft_to_target)
    where = g.op("Unsqueeze", sample_index, g.const([1]))
    results = []
    for name, by_match, by_rejection in zip(("accepted", "next_tokens"), (accepted, following), sampled):
        merged = g.op("ScatterElements", by_match, where, by_rejection, axis=0)
        g.op("Squeeze", merged, g.const([1]), out=name)
        g.output(name, "int64", ("R",))
        results.append(merged)
    g.output("complete", "bool", ("Mf",))
    log_probs(g, logits, draft_tokens, *results, G, V)
    g.prune()
    return g


def wide_scores(g: Graph, logits: str, wide_rows: str, V: int) -> tuple[str, str]:
    """(edited logits / temperature [Mw, V], their softmax). An edit is l -> (l / s if l > 0 else l * s) + a."""
    at = g.input("edit_at", "int64", ("E", 2))  # (wide row, token), each pair once
    scale = g.input("edit_scale", "float32", ("E",))
    add = g.input("edit_add", "float32", ("E",))
    temperature = g.op("Unsqueeze", g.input("temperature", "float32", ("Mw",)), g.const([1]))
    x = g.op("Gather", logits, wide_rows)
    old = g.op("GatherND", x, at)
    positive = g.op("Greater", old, g.const(0.0, "float32"))
    new = g.op("Add", g.op("Where", positive, g.op("Div", old, scale), g.op("Mul", old, scale)), add)
    new = g.op("Clip", new, g.const(-LIMIT, "float32"), g.const(LIMIT, "float32"))
    scores = g.op("Div", g.op("ScatterND", x, at, new), temperature)
    return scores, g.op("Softmax", scores, axis=-1)


def filters(g: Graph, p: str, wide_rows: str, V: int) -> tuple[str, str]:
    """(least probability that is kept [Mw, 1], sum of the kept ones [Mw, 1]): (0, 1) for a row without filters.

    All three filters are thresholds on values, found among the K largest of a row. A row is `complete` when its
    thresholds lie among them; the result is then the one of K = V, bit for bit: sums run from the largest down.
    """
    rows = g.input("filter_rows", "int64", ("Mf",))
    top_k = g.op("Unsqueeze", g.input("top_k", "int64", ("Mf",)), g.const([1]))  # V = off
    top_p = g.op("Unsqueeze", g.input("top_p", "float32", ("Mf",)), g.const([1]))  # 1 = off
    min_p = g.op("Unsqueeze", g.input("min_p", "float32", ("Mf",)), g.const([1]))  # 0 = off
    K = g.input("top_count", "int64", (1,))
    zero, one = g.const(0.0, "float32"), g.const(1.0, "float32")
    row = g.op("Gather", p, rows)  # [Mf, V]
    largest = g.op("TopK", row, K, out=2, axis=-1, largest=1, sorted=1)[0]  # [Mf, K]
    before = g.op("CumSum", largest, g.const(1), exclusive=1)  # mass of the ones before each

    by_k = g.op("Less", top_k, g.const(V))
    last = g.op("Min", g.op("Sub", top_k, g.const(1)), g.op("Sub", K, g.const(1)))
    kth = g.op("GatherElements", largest, last, axis=1)
    at_least_k = g.op("Where", by_k, kth, zero)
    ties = g.op(
        "ReduceSum", g.op("Cast", g.op("GreaterOrEqual", row, kth), to=1), g.const([1]), keepdims=1
    )  # whole numbers
    ties = g.op("Sub", ties, g.op("Cast", last, to=1))  # the k-th and those equal to it further down
    mass = g.op("Add", g.op("GatherElements", before, last, axis=1), g.op("Mul", ties, kth))
    mass = g.op("Where", by_k, mass, one)

    by_p = g.op("Less", top_p, one)
    inside = g.op("Less", before, g.op("Mul", top_p, mass))
    count = g.op("ReduceSum", g.op("Cast", inside, to=7), g.const([1]), keepdims=1)  # 1 or more: before[0] = 0
    at_least_p = g.op("GatherElements", largest, g.op("Sub", count, g.const(1)), axis=1)
    at_least_p = g.op("Where", by_p, at_least_p, zero)
    at_least_m = g.op("Mul", min_p, g.op("Slice", largest, g.const([0]), g.const([1]), g.const([1])))
    threshold = g.op("Max", at_least_k, at_least_p, at_least_m)

    k_fits = g.op("Or", g.op("Not", by_k), g.op("LessOrEqual", top_k, K))
    p_fits = g.op("Or", g.op("Less", count, K), g.op("And", by_k, g.op("LessOrEqual", top_k, K)))
    p_fits = g.op("Or", g.op("Not", by_p), g.op("Or", p_fits, g.op("GreaterOrEqual", K, g.const([V]))))
    g.op("Squeeze", g.op("And", k_fits, p_fits), g.const([1]), out="complete")

    total = row_total(g, g.op("Where", g.op("GreaterOrEqual", row, threshold), row, zero), V)
    shape = g.op("Concat", g.op("Shape", wide_rows), g.const([1]), axis=0)  # [Mw, 1]
    at = g.op("Unsqueeze", rows, g.const([1]))
    spread = lambda default, values: g.op("ScatterElements", g.op("Expand", default, shape), at, values, axis=0)
    return spread(zero, threshold), spread(one, total)


def matches(g: Graph, top: str, wide_rows: str, scores: str, p: str, threshold: str, V: int) -> str:
    """`top` [M, 1], a row's token under the greedy rule, with the matched rows' own: the argmax of score + noise among
    the tokens that the filters keep. A draft token is accepted iff it is its row's token."""
    rows = g.input("match_rows", "int64", ("Mc",))  # wide rows
    noise = g.input("noise", "float32", ("Mc", V))
    filtered = g.input("match_filtered", "int64", ("Mx",))  # which of the Mc rows have filters
    column = lambda x: g.op("Unsqueeze", x, g.const([1]))
    perturbed = g.op("Add", g.op("Gather", scores, rows), noise)
    token = argmax(g, perturbed, V)
    own = g.op("Gather", rows, filtered)
    kept = g.op("GreaterOrEqual", g.op("Gather", p, own), g.op("Gather", threshold, own))
    kept = g.op("Where", kept, g.op("Gather", perturbed, filtered), g.const(LOWEST, "float32"))
    token = g.op("ScatterElements", token, column(filtered), argmax(g, kept, V), axis=0)
    return g.op("ScatterElements", top, column(g.op("Gather", wide_rows, rows)), token, axis=0)


def rejection(
    g: Graph, p: str, threshold: str, kept: str, draft_tokens: str, num_draft: str, sample_index: str, G: int, V: int,
    draft_to_target: np.ndarray,
) -> tuple[str, str]:
    """(accepted [Rs, 1], next token [Rs, 1]). With p' = p / kept where p >= threshold: x accepted iff u * q(x) < p'(x);
    at the first rejection the next token comes from max(p' - q, 0), after n acceptances from p' (paper, Algorithm
    1)."""
    V_d = len(draft_to_target)
    rows = g.input("sample_rows", "int64", ("Rs", G + 1))  # wide row of each slot
    draft_rows = g.input("draft_rows", "int64", ("Rs",))  # row of draft_probs
    draft_indices = g.input("draft_indices", "int64", ("Rs", G))
    draft_probs = g.input("draft_probs", "float32", ("Rq", G, V_d))
    uniform = g.input("accept_uniforms", "float32", ("Rs", G))
    next_uniform = g.input("next_uniforms", "float32", ("Rs", G + 1))
    column = lambda x: g.op("Unsqueeze", x, g.const([2]))
    n, x = g.op("Gather", num_draft, sample_index), g.op("Gather", draft_tokens, sample_index)

    judged = first_slots(g, rows, G)
    p_x = g.op("GatherND", p, g.op("Concat", column(judged), column(x), axis=2))  # [Rs, G]
    zeros = g.op("Mul", judged, g.const(0))
    slots = g.op("Add", zeros, g.const(np.arange(G)[None]))
    owner = g.op("Add", zeros, g.op("Unsqueeze", draft_rows, g.const([1])))
    q_x = g.op("GatherND", draft_probs, g.op("Concat", column(owner), column(slots), column(draft_indices), axis=2))
    of = lambda values, index: g.op("Squeeze", g.op("Gather", values, index), g.const([2]))  # [Mw, 1] at [Rs, m]
    below = g.op("Less", g.op("Mul", g.op("Mul", uniform, q_x), of(kept, judged)), p_x)
    fail = g.op("Not", g.op("And", below, g.op("GreaterOrEqual", p_x, of(threshold, judged))))
    accepted = first_failure(g, fail, n, G)  # [Rs, 1]

    row = g.op("GatherElements", rows, accepted, axis=1)  # [Rs, 1] wide row where the next token is drawn
    p_next = g.op("Gather", p, g.op("Squeeze", row, g.const([1])))  # [Rs, V]
    p_next = g.op("Where", g.op("GreaterOrEqual", p_next, of(threshold, row)), p_next, g.const(0.0, "float32"))
    slot = g.op("Min", accepted, g.const(G - 1))
    q_next = g.op("GatherND", draft_probs, g.op("Concat", g.op("Unsqueeze", draft_rows, g.const([1])), slot, axis=1))
    rejected = g.op("Cast", g.op("Less", accepted, n), to=1)  # 0 = drawn from p itself
    q_next = g.op("Mul", q_next, g.op("Mul", rejected, of(kept, row)))  # p - kept * q instead of p / kept - q
    residual = subtract(g, p_next, q_next, draft_to_target, V)
    empty = g.op("LessOrEqual", g.op("ReduceMax", residual, g.const([1]), keepdims=1), g.const(0.0, "float32"))
    residual = g.op("Add", residual, g.op("Mul", p_next, g.op("Cast", empty, to=1)))  # p itself where nothing is left
    return accepted, inverse_cdf(g, residual, g.op("GatherElements", next_uniform, accepted, axis=1), V)


def log_probs(g: Graph, logits: str, draft_tokens: str, accepted: str, following: str, G: int, V: int) -> None:
    """Output log_probs [Ml]: log softmax of the raw logits at the token of the slot: the draft token before slot
    `accepted`, the next token from there on (rows of later slots mean nothing)."""
    rows = g.input("log_prob_rows", "int64", ("Ml",))
    at = g.input("log_prob_at", "int64", ("Ml", 2))  # (request, slot)
    padded = g.op("Concat", draft_tokens, following, axis=1)  # [R, G+1]
    slots = g.const(np.arange(G + 1)[None])
    tokens = g.op("GatherND", g.op("Where", g.op("Less", slots, accepted), padded, following), at)  # [Ml]
    values = g.op("LogSoftmax", g.op("Gather", logits, rows), axis=-1)
    values = g.op("GatherElements", values, g.op("Unsqueeze", tokens, g.const([1])), axis=1)
    g.op("Squeeze", values, g.const([1]), out="log_probs")
    g.output("log_probs", "float32", ("Ml",))


def first_slots(g: Graph, x: str, G: int) -> str:
    """[R, G+1, ...] -> [R, G, ...]."""
    return g.op("Slice", x, g.const([0]), g.const([G]), g.const([1]))


def first_failure(g: Graph, fail: str, num_draft: str, G: int) -> str:
    """fail [R, G] bool, num_draft [R, 1] -> [R, 1]: the first failing slot, or n when none of the first n fails."""
    slots = g.const(np.arange(G)[None, :])
    first = g.op("Min", g.op("Where", fail, slots, g.const(G)), num_draft)
    return g.op("ReduceMin", first, g.const([1]), keepdims=1)


def subtract(g: Graph, p: str, q: str, draft_to_target: np.ndarray, vocab_size: int) -> str:
    """p [Rs, V], q [Rs, V_d] -> max(p - q, 0) [Rs, V], q = 0 outside the draft vocabulary: p stays as it is there."""
    if np.array_equal(draft_to_target, np.arange(vocab_size)):
        return g.op("Relu", g.op("Sub", p, q))
    at = g.weight("draft_to_target", draft_to_target.astype(np.int64)[None], ("d2t",))
    at = g.op("Expand", at, g.op("Shape", q))  # [Rs, V_d]
    return g.op("ScatterElements", p, at, g.op("Relu", g.op("Sub", g.op("GatherElements", p, at, axis=1), q)), axis=1)
