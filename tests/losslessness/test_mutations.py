"""Faults that the kit must notice: each is a changed graph, batch or method, and the test fails where the kit passes it.

Mutations too: "draft uniforms reused over rounds" (test_history.py), "a retrospective argmax" (test_counterexample.py),
"log-probs of the edited distribution" (test_log_probs.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from decoding import random
from decoding.loop import Loop
from decoding.random import ACCEPT
from decoding.request import Request, Sequence
from decoding.sampling import Edits
from decoding.schedule_lagged import Lagged
from engines.sps import Sps
from export import verify as export_verify
from tests.losslessness import table
from tests.losslessness.changed import Changed, with_verify_graph
from tests.losslessness.driving import make, run
from tests.losslessness.exact import BOUND, p_value
from tests.losslessness.schedulers import Alone, LooksAhead
from tests.losslessness.test_counterexample import appendix_a, first_tokens, paper_sps
from tests.losslessness.test_distribution import KINDS, draw, params, todo, worst

EACH = 400  # draws of each kind: enough for every fault below


def least(engines, kinds, schedule="fixed", accept="rejection", each=EACH) -> float:
    """The least p-value of the distribution test over `kinds`."""
    scheduler = make(schedule) if isinstance(schedule, str) else schedule
    loop = Loop(engines, scheduler, max_requests=64, token_budget=1 << 16, accept=accept)
    return min(worst(engines, draw(loop, todo(kinds, each, 77))).values())


PLAIN = ["plain temperature 1", "temperature 0.7"]


def test_the_shipped_code_passes_with_the_same_draws(jagged):
    assert least(jagged, [*KINDS]) > BOUND


# -- changed batches and results ---------------------------------------------------------------------------------------


def one_more_accepted(call, batch):
    result = call(batch)
    return replace(result, accepted=np.minimum(result.accepted + 1, batch.num_draft))


def one_less_accepted(call, batch):
    result = call(batch)
    return replace(result, accepted=np.maximum(result.accepted - 1, 0))


def altered(**changes):
    """A verify engine whose batch's arrays are changed by these functions."""
    return lambda call, batch: call(replace(batch, **{name: f(getattr(batch, name)) for name, f in changes.items()}))


def top_2(q):
    kept = np.where(q >= np.sort(q, axis=-1)[..., -2:-1], q, 0)
    return (kept / np.maximum(kept.sum(axis=-1, keepdims=True), 1e-30)).astype(np.float32)  # zeros where no draft is


BATCHES = {
    "accepts one more": (one_more_accepted, PLAIN),
    "accepts one less": (one_less_accepted, PLAIN),
    "slots judged by the row after": (
        altered(sample_rows=lambda r: np.concatenate([r[:, 1:], r[:, -1:]], axis=1)),
        PLAIN,
    ),
    "slots judged by the q after": (altered(draft_probs=lambda q: np.roll(q, 1, axis=1)), PLAIN),
    "judged by another request's q": (altered(draft_rows=lambda r: np.roll(r, 1)), PLAIN),
    "accepts everything": (altered(accept_uniforms=np.zeros_like), PLAIN),
    "accepts too much": (altered(accept_uniforms=lambda u: u * np.float32(0.7)), PLAIN),
    "wrong draft distribution": (altered(draft_probs=lambda q: np.full_like(q, 1 / q.shape[-1])), PLAIN),
    "filter applied to the draft's q": (altered(draft_probs=top_2), ["top_k"]),
    "temperature forgotten": (altered(temperature=np.ones_like), ["temperature 0.7", "temperature 1.5, ends"]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_changed_batches_are_caught(jagged, name):
    change, kinds = BATCHES[name]
    assert least(Changed(jagged, verify=change), kinds) < BOUND


def test_next_token_from_the_accept_uniform_is_caught(jagged):
    shifted = lambda call, b: call(
        replace(b, next_uniforms=np.concatenate([b.accept_uniforms, b.next_uniforms[:, :1]], axis=1))
    )
    assert least(Changed(jagged, verify=shifted), PLAIN) < BOUND


# -- changed graphs ----------------------------------------------------------------------------------------------------


def not_normalised(g, weights, uniform, size):
    cdf = g.op("CumSum", weights, g.const(1))
    count = g.op("ReduceSum", g.op("Cast", g.op("LessOrEqual", cdf, uniform), to=7), g.const([1]), keepdims=1)
    return g.op("Min", count, g.const(size - 1))


def filters_before_temperature(honest):
    def filters(g, p, wide_rows, V):
        """Thresholds found at temperature 1, then put back to where they lie in p."""
        one, t = g.const([1]), g.op("Unsqueeze", "temperature", g.const([1]))
        raised = g.op("Pow", p, t)
        total = g.op("ReduceSum", raised, one, keepdims=1)
        threshold, _ = honest(g, g.op("Div", raised, total), wide_rows, V)
        back = g.op("Pow", g.op("Mul", threshold, total), g.op("Div", g.const(1.0, "float32"), t))
        back = g.op("Mul", back, g.const(1 - 1e-5, "float32"))
        kept = g.op("Where", g.op("GreaterOrEqual", p, back), p, g.const(0.0, "float32"))
        return back, g.op("ReduceSum", kept, one, keepdims=1)

    return filters


GRAPHS = {
    "residual not normalised": ("inverse_cdf", lambda honest: not_normalised, PLAIN),
    "top-p before temperature": ("filters", filters_before_temperature, ["top_p"]),
}


def test_a_wrong_draft_distribution_after_pruning_is_caught(jagged, tmp_path):
    """The residual takes the draft's probabilities off tokens 0 .. V_d - 1, as if nothing had been pruned."""
    assert least(with_verify_graph(jagged, tmp_path), PLAIN) > BOUND
    unpruned = np.arange(len(table.DRAFT_TO_TARGET))
    assert least(with_verify_graph(jagged, tmp_path, unpruned), PLAIN) < BOUND


@pytest.mark.parametrize("name", GRAPHS)
def test_changed_graphs_are_caught(jagged, tmp_path, monkeypatch, name):
    function, change, kinds = GRAPHS[name]
    monkeypatch.setattr(export_verify, function, change(getattr(export_verify, function)))
    assert least(with_verify_graph(jagged, tmp_path), kinds) < BOUND


# -- changed methods ---------------------------------------------------------------------------------------------------


def test_accept_uniforms_equal_to_the_drafts_are_caught(jagged, monkeypatch):
    draft, judge = Sequence.draft_uniforms, Sequence.uniforms

    def remembered(s, slots):
        s.last = draft(s, slots)
        return s.last

    monkeypatch.setattr(Sequence, "draft_uniforms", remembered)
    monkeypatch.setattr(
        Sequence, "uniforms", lambda s, p, n: s.last[:n] if p == ACCEPT and hasattr(s, "last") else judge(s, p, n)
    )
    assert least(jagged, PLAIN) < BOUND


def test_penalties_that_ignore_the_blocks_own_prefix_are_caught(jagged, monkeypatch):
    honest = Edits.block

    def first_row_only(edits, text, draft):
        block = honest(edits, text, [])
        return block._replace(**{k: np.repeat(getattr(block, k), len(draft) + 1, axis=0) for k in ("scale", "add")})

    monkeypatch.setattr(Edits, "block", first_row_only)
    assert least(jagged, ["edits", "min_p, repetition"], each=1500) < BOUND


@pytest.mark.parametrize("schedule", ["threshold", "causal", "lagged"])
def test_a_confidence_that_sees_its_own_token_is_caught(flat_graphs, schedule):
    """c_k from x_k instead of x_{k-1}: the cut depends on the token that is cut. Each request with a scheduler of its
    own."""
    last = {}

    def markov(call, batch):
        last["tokens"] = (result := call(batch)).draft_tokens.copy()
        return result

    def confidence(call, batch):
        return call(replace(batch, markov_embeddings=np.eye(table.V, dtype=np.float32)[last["tokens"]]))

    two = appendix_a().confidence * 0 - 3.0  # c = 0.05 after B, 0.95 after A
    two[..., 0] = 3.0
    engines = table.TableEngines(flat_graphs, appendix_a().changed(confidence=two))
    sps = Sps.from_points([(1, n, 0, 1.0 + 0.2 * (n - 1)) for n in range(1, 6)], [(1, 0, 1e-6)])

    def chance(engines):
        counts = first_tokens(engines, Alone(lambda: make(schedule, sps), 200), draws=10_000, rows=200)
        return p_value(counts, counts.sum() * np.array([0.7, 0.3]))

    assert chance(engines) > BOUND
    assert chance(Changed(engines, markov=markov, confidence=confidence)) < BOUND


def test_a_scheduler_that_looks_ahead_is_caught(flat_graphs):
    counts = first_tokens(table.TableEngines(flat_graphs, appendix_a()), LooksAhead(), draws=5_000, rows=200)
    assert p_value(counts, counts.sum() * np.array([0.7, 0.3])) < BOUND


def test_lagged_with_the_current_rounds_budget_is_caught(flat_graphs):
    """The unconstrained search over this very round's survivals: Appendix A's bias comes back."""

    class Now(Lagged):
        timed = lambda self, *times: None
        draft = lambda self, load: load.requests

        def lengths(self, state):
            self.probing, self._found, self._gained = False, None, {}
            self._pool, (self._pooled, self._G) = deque([state.survival]), state.survival.shape
            return super().lengths(state)

    sps = paper_sps()
    counts = first_tokens(
        table.TableEngines(flat_graphs, appendix_a()), Alone(lambda: Now(sps), 200), draws=5_000, rows=200
    )
    assert p_value(counts, counts.sum() * np.array([0.7, 0.3])) < BOUND and counts[0] / counts.sum() > 0.75


def test_coupled_noise_keyed_by_the_draft_is_caught(jagged, monkeypatch):
    """Noise of (round, slot) instead of the position: the distribution is right, the seed's text is not."""
    requests = [Request(i, (1, 2), params("plain temperature 1", max_tokens=8, seed=i)) for i in range(20)]
    texts = lambda name: run(Loop(jagged, make(name), max_requests=5, accept="coupled"), requests)
    assert texts("fixed") == texts("none")

    def by_round(s, count):
        if getattr(s, "seen", None) != len(s.tokens):
            s.seen, s.round = len(s.tokens), getattr(s, "round", -1) + 1
        return np.stack(
            [
                random.gumbel(s.request.params.seed, 100 * s.round + k, np.empty(table.V, np.float32))
                for k in range(count)
            ]
        )

    monkeypatch.setattr(Sequence, "noise", by_round)
    assert texts("fixed") != texts("none")
