"""Batches of sequences, and which prompts are held out."""

import numpy as np

from tests.training.answered import Answered
from training.data import is_held_out, make_batches


def test_batches_hold_every_sequence_once_and_stay_in_size(sequences):
    batches = make_batches(sequences, 200, 1024)
    assert sum(len(b.lengths) for b in batches) == len(sequences)
    assert all(b.tokens.numel() <= 200 for b in batches)
    answers = sum(len(s.tokens) - s.prompt_length for s in sequences)
    assert sum(int(b.loss_mask.sum()) for b in batches) == answers
    assert [b.lengths for b in make_batches(sequences[::-1], 200, 1024)] == [b.lengths for b in batches]


def test_long_sequences_are_cut_and_short_answers_left_out():
    tokens = np.arange(30, dtype=np.int32)
    batches = make_batches([Answered(tokens, 10), Answered(tokens, 29), Answered(tokens, 19)], 200, 20)
    assert [b.lengths for b in batches] == [[20]]


def test_held_out_follows_the_prompt_alone():
    prompt = [5, 6, 7]
    a, b = Answered(np.array([*prompt, 1, 2]), 3), Answered(np.array([*prompt, 9, 9, 9]), 3)
    assert is_held_out(a) == is_held_out(b)
    shares = [is_held_out(Answered(np.array([i, i + 1, 0]), 2)) for i in range(4000)]
    assert 0.02 < np.mean(shares) < 0.045
