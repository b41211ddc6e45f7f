import math

import numpy as np
import pytest

from decoding.random import ACCEPT, DRAFT, NEXT, gumbel, uniforms
from decoding.request import Limits, Request, RequestError, SamplingParams, Sequence, validate

LIMITS = Limits(context=100, vocab_size=50, eos_token_ids=(2, 3))


def check(ids=(1, 2), **params):
    validate(Request("x", ids, SamplingParams(**{"max_tokens": 10, **params})), LIMITS)


def test_the_borders_are_allowed():
    check(ids=(0, 49), max_tokens=98, temperature=100.0, seed=2**64 - 1, threshold=1.0)
    check(ids=(7,) * 99, max_tokens=1, temperature=0, threshold=0.0)
    check(temperature=np.float32(0.5), seed=np.uint64(3), max_tokens=np.int64(3))
    check(accept="coupled", top_k=50, top_p=1e-3, min_p=0.999, repetition_penalty=10, presence_penalty=-2, frequency_penalty=2)
    check(bad_words=((0, 49), [1]), logit_bias=[(0, -100), [49, 100.0]], min_tokens=10, return_log_probs=True)
    check(bad_words=tuple((t,) for t in range(49)))  # one token is left


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
    (dict(accept="greedy"), "accept is 'greedy'; it must be rejection or coupled."),
    (dict(accept="coupled", seed=-1), "seed is -1"),
    (dict(top_k=-1), "top_k is -1; it must lie in 0..50 (0 = off)."),
    (dict(top_k=51), "top_k is 51"),
    (dict(top_k=1.0), "top_k is 1.0"),
    (dict(top_p=0), "top_p is 0; it must be over 0 and at most 1 (1 = off)."),
    (dict(top_p=1.01), "top_p is 1.01"),
    (dict(min_p=1.0), "min_p is 1.0; it must be at least 0 and under 1 (0 = off)."),
    (dict(repetition_penalty=0), "repetition_penalty is 0; it must be over 0 and at most 10 (1 = off)."),
    (dict(repetition_penalty=math.nan), "repetition_penalty is nan"),
    (dict(presence_penalty=2.1), "presence_penalty is 2.1; it must lie in -2..2 (0 = off)."),
    (dict(frequency_penalty="x"), "frequency_penalty is x"),
    (dict(min_tokens=11), "min_tokens is 11; it must lie in 0..10 (max_tokens)."),
    (dict(bad_words=((),)), "bad_words holds an empty word; each must hold at least 1 token id."),
    (dict(bad_words=((1, 50),)), "bad_words holds the token id 50; every id must lie in 0..49."),
    (dict(bad_words=(3,)), "bad_words holds 3; it must be a list of lists of token ids."),
    (dict(bad_words="no"), "bad_words is 'no'"),
    (dict(bad_words=tuple((t,) for t in range(50))), "bad_words and min_tokens could ban all 50 tokens at once"),
    (dict(bad_words=tuple((1, t) for t in range(4, 50)) + ((0,), (1,)), min_tokens=1), "bad_words and min_tokens could ban"),
    (dict(logit_bias=((50, 1),)), "logit_bias holds the token id 50; every id must lie in 0..49."),
    (dict(logit_bias=((5, 1), (5, 1))), "logit_bias holds the token id 5 twice; it must hold each id once."),
    (dict(logit_bias=((5, 101),)), "logit_bias gives the token id 5 the bias 101; it must lie in -100..100."),
    (dict(logit_bias=(5,)), "logit_bias holds 5; it must be a list of (token id, bias) pairs."),
    (dict(return_log_probs=1), "return_log_probs is 1; it must be true or false."),
]


@pytest.mark.parametrize("change, message", BAD)
def test_out_of_range_is_one_sentence(change, message):
    with pytest.raises(RequestError) as error:
        check(**change)
    assert str(error.value).startswith(message) and "\n" not in str(error.value) and str(error.value).endswith(".")


def sequence(twin=0, **params):
    return Sequence(Request("x", (1, 2, 3), SamplingParams(10, **params)), True, twin=twin, limits=LIMITS)


def test_judging_uniforms_follow_the_absolute_position():
    s = sequence(temperature=1.0, seed=9)
    np.testing.assert_array_equal(s.uniforms(ACCEPT, 4), uniforms(9, 3 + np.arange(4), ACCEPT))
    s.tokens += [4, 5]
    np.testing.assert_array_equal(s.uniforms(NEXT, 4), uniforms(9, 5 + np.arange(4), NEXT))
    s.tokens += [0] * 1000  # far past what was made ahead
    np.testing.assert_array_equal(s.uniforms(ACCEPT, 5), uniforms(9, 1005 + np.arange(5), ACCEPT))


def test_no_draft_uniform_is_used_twice():
    """A discarded draft steered the schedule: the next draft of the same position must be made of other numbers."""
    s = sequence(temperature=1.0, seed=9)
    blocks = [s.draft_uniforms(6).copy() for _ in range(200)]
    np.testing.assert_array_equal(blocks, uniforms(9, np.arange(200)[:, None], DRAFT, np.arange(6)[None]))
    assert len(np.unique(blocks)) > 1190


def test_twins_share_nothing():
    one, other = sequence(temperature=1.0, seed=9), sequence(temperature=1.0, seed=9, twin=1)
    for draw in (lambda s: s.uniforms(ACCEPT, 50), lambda s: s.uniforms(NEXT, 50), lambda s: s.draft_uniforms(6)):
        assert not np.isin(draw(one), draw(other)).any()


def test_noise_follows_the_absolute_position_and_is_kept():
    s = sequence(temperature=1.0, seed=9, accept="coupled")
    want = [gumbel(9, p, np.empty(50, np.float32)) for p in range(30)]
    np.testing.assert_array_equal(s.noise(5), want[3:8])
    np.testing.assert_array_equal(s.noise(2), want[3:5])
    s.tokens += [4, 5]
    np.testing.assert_array_equal(s.noise(6), want[5:11])
    np.testing.assert_array_equal(s.noise(1), want[5:6])
    s.tokens += [0] * 10
    np.testing.assert_array_equal(s.noise(4), want[15:19])


def test_the_rule_of_a_request():
    assert sequence(temperature=1.0).drawn and not sequence(temperature=1.0).coupled
    assert sequence(temperature=1.0, accept="coupled").coupled
    greedy = sequence(temperature=1e-9, accept="coupled", top_k=3)
    assert greedy.temperature == 0.0 and not (greedy.drawn or greedy.coupled or greedy.filtered)
    own = Request("x", (1,), SamplingParams(10, temperature=1.0))
    assert Sequence(own, True, accept="coupled", limits=LIMITS).coupled


def test_waiting_context_is_handed_over_in_parts():
    sequence = Sequence(Request(0, (1, 2, 3), SamplingParams(4)), speculative=True, limits=Limits(64, 64))
    for rows in (3, 2):
        sequence.keep(np.full((rows, 2), rows, np.float32))
    assert [len(p) for p in sequence.waiting(4)] == [3, 1] and sequence.waiting(0) == []
    sequence.injected(4)
    assert (sequence.draft_length, sequence.pending_rows, [len(p) for p in sequence.pending]) == (4, 1, [1])
    sequence.injected(1)
    assert (sequence.draft_length, sequence.pending_rows, sequence.pending) == (5, 0, [])


def test_rows_that_nobody_writes_again_are_kept_as_they_are():
    sequence = Sequence(Request(0, (1, 2, 3), SamplingParams(4)), speculative=True, limits=Limits(64, 64))
    copied, own = np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32)
    sequence.keep(copied), sequence.keep(own, True)
    copied += 1
    assert not sequence.waiting(2)[0].any() and sequence.waiting(2)[1] is own
