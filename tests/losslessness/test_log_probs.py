"""Log-probs of the output are the raw target's, whatever edits, filters and temperatures a request has."""

from __future__ import annotations

import numpy as np
import pytest

from decoding.loop import Loop
from export import verify as export_verify
from tests.losslessness.changed import with_verify_graph
from tests.losslessness.driving import make
from tests.losslessness.exact import softmax
from tests.losslessness.test_distribution import KINDS, todo


def worst_log_prob(engines, schedule="fixed") -> float:
    """The largest error of any output token's log-prob, over requests of every kind."""
    loop, error, done = Loop(engines, make(schedule), max_requests=8), 0.0, {}
    requests = todo([*KINDS], 6, 5, return_log_probs=True)
    for request in requests:
        loop.add(request)
    while loop.has_work:
        for output in loop.step():
            assert output.finish_reason != "error", output.error
            assert len(output.log_probs) == len(output.token_ids)
            tokens, values = done.setdefault(output.request_id, ([], []))
            tokens += output.token_ids
            values += output.log_probs
    for request in requests:
        ids = list(request.prompt_ids)
        for token, value in zip(*done[request.id]):
            raw = engines.table.target[ids[-2] if len(ids) > 1 else 0, ids[-1]]
            error = max(error, abs(value - np.log(softmax(raw)[token])))
            ids.append(token)
    return error


@pytest.mark.parametrize("schedule", ["none", "fixed", "lagged"])
def test_log_probs_are_the_raw_targets(jagged, schedule):
    assert worst_log_prob(jagged, schedule) < 1e-4


def test_log_probs_of_the_edited_distribution_are_caught(jagged, tmp_path, monkeypatch):
    scores, honest = export_verify.wide_scores, export_verify.log_probs
    kept = {}

    def remembered(g, logits, wide_rows, V):
        kept["scores"], p = scores(g, logits, wide_rows, V)
        kept["rows"] = wide_rows
        return kept["scores"], p

    def of_the_edited(g, logits, *more):
        at = g.op("Unsqueeze", kept["rows"], g.const([1]))
        return honest(g, g.op("ScatterND", logits, at, kept["scores"]), *more)

    monkeypatch.setattr(export_verify, "wide_scores", remembered)
    monkeypatch.setattr(export_verify, "log_probs", of_the_edited)
    assert worst_log_prob(with_verify_graph(jagged, tmp_path)) > 0.1
