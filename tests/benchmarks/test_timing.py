"""Times of a request and of a run."""

import pytest

from benchmarks.common import Acceptance
from benchmarks.timing import Run, Timing


def timing(submitted: float, *arrivals: tuple[float, int]) -> Timing:
    made = Timing(submitted)
    for now, n in arrivals:
        made.add(now, [7] * n)
    return made


def test_inter_token_time_counts_tokens_not_responses():
    t = timing(1.0, (1.5, 1), (1.6, 3), (1.9, 1))
    assert t.first_token == pytest.approx(0.5)
    assert t.inter_token == pytest.approx(0.1)
    assert len(t.tokens) == 5


def test_empty_responses_do_not_count():
    t = timing(0.0, (0.5, 0), (1.0, 2))
    assert t.first_token == pytest.approx(1.0) and t.inter_token is None


def test_summary():
    a = Acceptance()
    a.add(6, 6, 2)
    run = Run(2.0, [timing(0.0, (0.2, 1), (0.6, 4)), timing(0.0, (0.4, 1), (0.6, 2))], a, outside_engines=0.1)
    s = run.summary()
    assert s["output_tokens"] == 8 and s["output_tok_s"] == pytest.approx(4.0)
    assert s["ttft_ms"] == pytest.approx(300) and s["itl_ms"] == pytest.approx(100)
    assert s["user_tok_s"] == pytest.approx(10) and s["acceptance_length"] == 3.0 and s["verified_per_round"] == 6
    assert s["outside_engines"] == 0.1
