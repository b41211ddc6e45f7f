"""The running mean of the weights: its arithmetic, and that it is lent, not given."""

import torch

from training.average import Average


def test_it_follows_the_weights_and_is_lent():
    weight = torch.nn.Parameter(torch.zeros(3))
    mean = Average([weight], 0.75)
    expected = 0.0
    for value in (4.0, 8.0):
        weight.data.fill_(value)
        mean.update()
        expected = 0.75 * expected + 0.25 * value
    assert torch.allclose(mean.values[0], torch.full((3,), expected)) and not mean.values[0].requires_grad
    with mean.lent():
        assert torch.equal(weight.detach(), mean.values[0])
    assert torch.equal(weight.detach(), torch.full((3,), 8.0))


def test_the_weights_come_back_after_an_error():
    weight = torch.nn.Parameter(torch.ones(2))
    mean = Average([weight], 0.5)
    weight.data.fill_(3.0)
    try:
        with mean.lent():
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(weight.detach(), torch.full((2,), 3.0))
