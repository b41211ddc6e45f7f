"""What observers see of a step: the same as its outputs say, for every mix of requests with and without a draft."""

from __future__ import annotations

import numpy as np
import pytest

from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from decoding.schedule import Fixed, NoDraft, Threshold


class Probing(Fixed):
    """Whole blocks for all, for one, for nobody, by turns; asks for the confidences."""

    uses_confidence = True

    def __init__(self):
        super().__init__()
        self.rounds = 0

    def draft(self, load):
        self.rounds += 1
        return (load.requests, min(load.requests, 1), 0)[self.rounds % 3]


class Notes(list):
    wants_confidence = False

    def round(self, trace):
        self.append((trace, None if trace.confidence_logits is None else trace.confidence_logits.copy()))


@pytest.mark.parametrize("scheduler", [NoDraft, Fixed, Threshold, Probing], ids=lambda s: s.__name__)
@pytest.mark.parametrize("plain", [False, True], ids=["all speculative", "some not"])
def test_a_trace_says_what_the_outputs_say(tiny, scheduler, plain):
    notes, rng = Notes(), np.random.default_rng(0)
    loop = Loop(tiny, scheduler(), max_requests=3, token_budget=16, observers=(notes,))
    temperatures = {}
    for i, n in enumerate((5, 30, 2, 12, 7, 21)):
        temperatures[i] = np.float32((0.0, 0.8)[i % 2])
        params = SamplingParams(max_tokens=8 + i, temperature=float(temperatures[i]), seed=i, speculative=not (plain and i % 3 == 0))
        loop.add(Request(i, tuple(rng.integers(0, 60, n).tolist()), params))
    kinds = set()
    while loop.has_work:
        before, stats = len(notes), {o.request_id: o.stats for o in loop.step() if o.stats is not None}
        assert len(notes) == before + bool(stats)
        if not stats:
            continue
        trace, logits = notes[-1]
        assert sorted(trace.ids) == sorted(stats)
        each = [stats[i] for i in trace.ids]
        drafted = np.array([s.drafted > 0 for s in each])
        np.testing.assert_array_equal(trace.drafted, drafted)
        np.testing.assert_array_equal(trace.verified, [s.verified for s in each])
        np.testing.assert_array_equal(trace.accepted, [s.accepted for s in each])
        np.testing.assert_array_equal(trace.temperature, [temperatures[i] for i in trace.ids])
        assert trace.budget == sum(s.verified for s in each) and trace.tokens >= trace.budget + len(each)
        for array in (logits, trace.survival):
            if array is not None:
                assert array.shape == (len(each), loop.G)
                np.testing.assert_array_equal(np.isnan(array).any(axis=1), ~drafted)
        if drafted.any() and loop.scheduler.uses_confidence:
            assert (np.diff(trace.survival[drafted]) <= 0).all() and (trace.survival[drafted] > 0).all()
        kinds.add((len(each), int(drafted.sum())))
    assert len(kinds) > 2
    for trace, logits in notes:  # later rounds leave it as it is
        assert logits is None or np.array_equal(trace.confidence_logits, logits, equal_nan=True)
