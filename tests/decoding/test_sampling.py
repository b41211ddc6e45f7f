"""Edits against a token-by-token reading of the documented order."""

import numpy as np
import pytest

from decoding.request import SamplingParams
from decoding.sampling import Edits

V, EOS = 40, (7, 9)


def edited(row, params, prompt, output):
    """The row [V] that follows prompt + output, by the book."""
    l, text = row.astype(np.float64), [*prompt, *output]
    for t in set(text):
        l[t] = l[t] / params.repetition_penalty if l[t] > 0 else l[t] * params.repetition_penalty
    for t in set(output):
        l[t] -= params.presence_penalty + params.frequency_penalty * output.count(t)
    for t, bias in params.logit_bias:
        l[t] += bias
    for word in params.bad_words:
        before = list(word[:-1])
        if not before or text[-len(before) :] == before:
            l[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        l[list(EOS)] = -np.inf
    return l


def applied(row, block, j):
    l = row.astype(np.float64)
    old = l[block.tokens]
    assert len(set(block.tokens.tolist())) == len(block.tokens)
    l[block.tokens] = np.where(old > 0, old / block.scale[j], old * block.scale[j]) + block.add[j]
    return l


CASES = {
    "repetition": dict(repetition_penalty=1.3),
    "repetition under 1": dict(repetition_penalty=0.6),
    "presence and frequency": dict(presence_penalty=0.7, frequency_penalty=-0.4),
    "bias": dict(logit_bias=((3, 5.0), (7, -100.0))),
    "bad words": dict(bad_words=((4,), (1, 2), (2, 2, 5), (3, 1, 2, 6), (1, 8))),
    "min tokens": dict(min_tokens=9),
    "all": dict(
        repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, logit_bias=((3, 5.0), (4, 1.0), (7, 2.0)),
        bad_words=((4,), (1, 2), (2, 2, 5), (7,)), min_tokens=6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_every_block_sees_its_own_prefix(name):
    """A text that grows by blocks of which some is rejected: row j is conditioned on the text and x_1 .. x_j."""
    rng = np.random.default_rng(3)
    params = SamplingParams(40, **CASES[name])
    prompt = [1, 2, 2, 5, 11]
    edits, text = Edits.of(params, len(prompt), EOS), list(prompt)
    while len(text) < 60:
        draft = rng.integers(0, 9, rng.integers(0, 6)).tolist()  # few tokens: repeats, and words that end in the draft
        block = edits.block(text, draft)
        assert block.scale.shape == block.add.shape == (len(draft) + 1, len(block.tokens)) and block.add.dtype == np.float32
        for j in range(len(draft) + 1):
            row = rng.standard_normal(V).astype(np.float32) * 3
            want = edited(row, params, prompt, [*text, *draft[:j]][len(prompt) :])
            np.testing.assert_allclose(applied(row, block, j), want, rtol=1e-6, atol=1e-6)
        text += draft[: rng.integers(0, len(draft) + 1)] + rng.integers(0, 9, 1).tolist()


def test_repetition_counts_the_prompt_and_the_other_penalties_do_not():
    prompt = [3, 4]
    repetition = Edits.of(SamplingParams(9, repetition_penalty=2.0), 2).block([*prompt, 5], [])
    assert sorted(repetition.tokens[repetition.scale[0] == 2].tolist()) == [3, 4, 5]
    presence = Edits.of(SamplingParams(9, presence_penalty=1.0), 2).block([*prompt, 5], [])
    assert presence.tokens[presence.add[0] == -1].tolist() == [5]


def test_nothing_to_edit_is_none():
    assert Edits.of(SamplingParams(9, temperature=1.0, top_k=3, top_p=0.5), 2, EOS) is None
    assert Edits.of(SamplingParams(9, min_tokens=3), 2, ()) is None  # a target without an end-of-sequence token
    assert Edits.of(SamplingParams(9, min_tokens=3), 2, EOS) is not None


def test_many_tokens_keep_their_columns():
    rng = np.random.default_rng(0)
    prompt = rng.permutation(5000).tolist()
    edits = Edits.of(SamplingParams(9, repetition_penalty=1.5, logit_bias=((17, 2.0),)), len(prompt))
    block = edits.block(prompt, [17, 5001])
    assert sorted(block.tokens.tolist()) == [*range(5000), 5001]
    assert (block.scale[2] == np.float32(1.5)).all() and block.scale[1][block.tokens == 5001] == 1
    assert block.add[0][block.tokens == 17] == 2
