"""The verify engine's graph: rejection sampling of a block against the target's logits, greedy as its exact limit.

Knows: the accept rule and the residual (docs/structures.md, "verify"), all in float32. Refuses to know: models, batching.
Legend: M rows of logits, R requests, Rs requests that sample, G block size, V / V_d target / draft vocabulary.
"""

from __future__ import annotations

import numpy as np

from .graph import Graph
from .heads import inverse_cdf


def build_verify(block_size: int, vocab_size: int, draft_to_target: np.ndarray) -> Graph:
    """draft_to_target [V_d]: target id of each draft token. Probability outside it is 0 under the draft."""
    g, G, V, V_d = Graph("verify"), block_size, vocab_size, len(draft_to_target)
    logits = g.input("logits", "float32", ("M", V))
    row_index = g.input("row_index", "int64", ("R", G + 1))
    draft_tokens = g.input("draft_tokens", "int64", ("R", G))
    draft_indices = g.input("draft_indices", "int64", ("R", G))
    draft_probs = g.input("draft_probs", "float32", ("R", G, V_d))
    num_draft = g.op("Unsqueeze", g.input("num_draft", "int64", ("R",)), g.const([1]))  # [R, 1]
    temperature = g.input("temperature", "float32", ("R",))
    sample_index = g.input("sample_index", "int64", ("Rs",))
    accept_uniforms = g.input("accept_uniforms", "float32", ("R", G))
    next_uniforms = g.input("next_uniforms", "float32", ("R", G + 1))

    # Greedy, for every request: accepted iff the argmax, next = the argmax after the last accepted.
    top = g.op("Gather", g.op("ArgMax", logits, axis=-1, keepdims=0), row_index)  # [R, G+1]
    fail = g.op("Not", g.op("Equal", draft_tokens, first_slots(g, top, G)))
    greedy_accepted = first_failure(g, fail, num_draft, G)  # [R, 1]
    greedy_next = g.op("GatherElements", top, greedy_accepted, axis=1)  # [R, 1]

    # Sampled, on the Rs rows of sample_index only: nothing below is V wide when it is empty.
    take = lambda x: g.op("Gather", x, sample_index)
    n, uniform = take(num_draft), take(accept_uniforms)
    divisor = g.op("Unsqueeze", take(temperature), g.const([1, 2]))  # [Rs, 1, 1]
    p = g.op("Softmax", g.op("Div", g.op("Gather", logits, take(row_index)), divisor), axis=-1)  # [Rs, G+1, V]
    q = take(draft_probs)  # [Rs, G, V_d]
    at = lambda x, ids: g.op("Squeeze", g.op("GatherElements", x, g.op("Unsqueeze", ids, g.const([2])), axis=2), g.const([2]))
    p_x, q_x = at(first_slots(g, p, G), take(draft_tokens)), at(q, take(draft_indices))  # [Rs, G]
    fail = g.op("Not", g.op("Less", g.op("Mul", uniform, q_x), p_x))
    accepted = first_failure(g, fail, n, G)  # [Rs, 1]
    p_next = pick_slot(g, p, accepted, V)  # [Rs, V]
    rejected = g.op("Cast", g.op("Less", accepted, n), to=1)  # [Rs, 1] float32: 0 = drawn from p itself
    q_next = g.op("Mul", pick_slot(g, q, g.op("Min", accepted, g.const(G - 1)), V_d), rejected)
    if V_d < V:
        q_next = widen(g, q_next, draft_to_target, V)
    residual = g.op("Relu", g.op("Sub", p_next, q_next))
    total = g.op("ReduceSum", residual, g.const([1]), keepdims=1)
    residual = g.op("Where", g.op("Greater", total, g.const(0.0, "float32")), residual, p_next)
    drawn = inverse_cdf(g, residual, g.op("GatherElements", take(next_uniforms), accepted, axis=1), V)  # [Rs, 1]

    where = g.op("Unsqueeze", sample_index, g.const([1]))
    for name, greedy, sampled in (("accepted", greedy_accepted, accepted), ("next_tokens", greedy_next, drawn)):
        merged = g.op("ScatterElements", greedy, where, sampled, axis=0)
        g.op("Squeeze", merged, g.const([1]), out=name)
        g.output(name, "int64", ("R",))
    g.prune()
    return g


def first_slots(g: Graph, x: str, G: int) -> str:
    """[R, G+1, ...] -> [R, G, ...]."""
    return g.op("Slice", x, g.const([0]), g.const([G]), g.const([1]))


def first_failure(g: Graph, fail: str, num_draft: str, G: int) -> str:
    """fail [R, G] bool, num_draft [R, 1] -> [R, 1]: the first failing slot, or n when none of the first n fails."""
    slots = g.const(np.arange(G)[None, :])
    first = g.op("Min", g.op("Where", fail, slots, g.const(G)), num_draft)
    return g.op("ReduceMin", first, g.const([1]), keepdims=1)


def pick_slot(g: Graph, x: str, slot: str, width: int) -> str:
    """x [Rs, slots, width], slot [Rs, 1] -> [Rs, width]."""
    return g.op("GatherND", x, slot, batch_dims=1)


def widen(g: Graph, q: str, draft_to_target: np.ndarray, vocab_size: int) -> str:
    """q [Rs, V_d] -> [Rs, V]: each target token's draft probability, 0 outside the draft vocabulary."""
    V_d = len(draft_to_target)
    column = np.full(vocab_size, V_d, dtype=np.int64)
    column[draft_to_target] = np.arange(V_d)
    zero = g.op("Mul", g.op("Slice", q, g.const([0]), g.const([1]), g.const([1])), g.const(0.0, "float32"))
    padded = g.op("Concat", q, zero, axis=1)
    return g.op("Gather", padded, g.weight("target_to_draft", column, ("d2t",)), axis=1)
