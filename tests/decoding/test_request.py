import math

import numpy as np
import pytest

from decoding.random import ACCEPT, DRAFT, uniforms
from decoding.request import Limits, Request, RequestError, SamplingParams, Sequence, validate

LIMITS = Limits(context=100, vocab_size=50)


def check(ids=(1, 2), **params):
    validate(Request("x", ids, SamplingParams(**{"max_tokens": 10, **params})), LIMITS)


def test_the_borders_are_allowed():
    check(ids=(0, 49), max_tokens=98, temperature=100.0, seed=2**64 - 1, threshold=1.0)
    check(ids=(7,) * 99, max_tokens=1, temperature=0, threshold=0.0)
    check(temperature=np.float32(0.5), seed=np.uint64(3), max_tokens=np.int64(3))


BAD = [
    (dict(ids=()), "prompt is empty; it must hold at least 1 token."),
    (dict(ids=(1,) * 100), "prompt is 100 tokens long; it must be at most 99 tokens (context 100)."),
    (dict(ids=(1, 50)), "input_ids holds 50; every id must lie in 0..49."),
    (dict(ids=(-1, 5)), "input_ids holds -1; every id must lie in 0..49."),
    (dict(ids=(1.5,)), "input_ids must be a list of integers."),
    (dict(max_tokens=0), "max_tokens is 0; it must lie in 1..98"),
    (dict(max_tokens=99), "max_tokens is 99; it must lie in 1..98"),
    (dict(max_tokens=True), "max_tokens is True"),
    (dict(max_tokens=1.0), "max_tokens is 1.0"),
    (dict(temperature=-0.1), "temperature is -0.1; it must lie in 0..100"),
    (dict(temperature=math.nan), "temperature is nan"),
    (dict(temperature=math.inf), "temperature is inf"),
    (dict(temperature="1"), "temperature is 1"),
    (dict(temperature=None), "temperature is None"),
    (dict(seed=-1), "seed is -1; it must lie in 0..2^64-1."),
    (dict(seed=2**64), "seed is 18446744073709551616"),
    (dict(seed=0.5), "seed is 0.5"),
    (dict(threshold=1.1), "threshold is 1.1; it must lie in 0..1."),
]


@pytest.mark.parametrize("change, message", BAD)
def test_out_of_range_is_one_sentence(change, message):
    with pytest.raises(RequestError) as error:
        check(**change)
    assert str(error.value).startswith(message) and "\n" not in str(error.value) and str(error.value).endswith(".")


def test_uniforms_follow_the_absolute_position():
    s = Sequence(Request("x", (1, 2, 3), SamplingParams(10, temperature=1.0, seed=9)), True, slack=5)
    np.testing.assert_array_equal(s.uniforms(DRAFT, 4), uniforms(9, 3 + np.arange(4), DRAFT))
    s.tokens += [4, 5]
    np.testing.assert_array_equal(s.uniforms(ACCEPT, 4), uniforms(9, 5 + np.arange(4), ACCEPT))
    s.tokens += [0] * 7  # nine tokens given: the last round still finds a whole block
    assert len(s.uniforms(DRAFT, 5)) == 5


def test_greedy_needs_none_and_a_tiny_temperature_is_greedy():
    s = Sequence(Request("x", (1,), SamplingParams(10, temperature=1e-9)), True, slack=5)
    assert s.temperature == 0.0 and not s.uniforms(DRAFT, 3).any()
