"""Generators: the same for the same words in every process, others for others."""

import torch

from training.seeds import generator_for, hash_words


def test_the_same_numbers_in_every_process():
    assert hash_words(1, 2) == 6804074658870690613
    assert 0 <= hash_words(2**63, 5) < 2**63


def test_seed_purpose_and_number_each_matter():
    draw = lambda *words: float(torch.rand((), generator=generator_for(*words)))
    assert draw(1, "anchors", 0) == draw(1, "anchors", 0)
    assert len({draw(1, "anchors", 0), draw(2, "anchors", 0), draw(1, "order", 0), draw(1, "anchors", 1)}) == 4
