"""When the tokens of a request came."""

import pytest

from benchmarks.timing import Timing


def test_empty_responses_do_not_count():
    t = Timing(0.0)
    t.add(0.5, [])
    t.add(1.0, [7, 7])
    assert t.first_token == pytest.approx(1.0) and t.tokens == [7, 7] and t.arrivals == [(1.0, 2)]
