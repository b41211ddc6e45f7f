"""The test of drawn tokens: counts, and the ranks of tokens that do or do not follow the target."""

import numpy as np
import pytest

from decoding.audit import default_answers
from decoding.draws import chi_square, sampled
from decoding.schedule import make


def test_chi_square_is_near_the_table():
    """Expected counts 25 each: chi 3.84 with 1 degree is p = 0.05 in the table, 11.07 with 5 degrees too."""
    one = np.sqrt(3.84 * 25 / 2)
    assert chi_square(np.array([25 + one, 25 - one]), np.full(2, 25.0)) == pytest.approx(0.05, abs=0.01)
    five = np.sqrt(11.07 * 25 / 6) * np.array([1, -1, 1, -1, 1, -1])
    assert chi_square(25 + five, np.full(6, 25.0)) == pytest.approx(0.05, abs=0.003)


@pytest.mark.parametrize("schedule", ["none", "fixed"])
def test_the_targets_own_draws_pass(tiny, schedule):
    (check,) = sampled(tiny, default_answers(tiny, None), schedule, make(schedule), 100, 8, 16)
    assert check.status == "ok" and check.figures["tokens"] == 800
    assert ("acceptance length" in check.detail) == (schedule == "fixed")


def test_a_request_that_fails_is_told(tiny):
    (check,) = sampled(tiny, default_answers(tiny, None), "none", make("none"), 4, 10**6, 4)
    assert check.status == "fail" and "max_tokens" in check.detail
