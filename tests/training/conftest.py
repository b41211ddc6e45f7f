"""Tiny models run on one thread: a second one only waits, and for long when the machine is busy."""

import numpy as np
import pytest
import torch

from tests.tiny import make_target
from tests.training.answered import Answered
from training.data import is_held_out
from training.evaluate import generate_plain
from training.target import TargetModel

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    return TargetModel.from_pretrained(make_target(tmp_path_factory.mktemp("target"), vocab=64, layers=3), (0, 1))


@pytest.fixture(scope="session")
def sequences(target):
    """Greedy answers of the target to random prompts; six of the 48 are held out."""
    g = torch.Generator().manual_seed(5)
    made, wanted = [], {True: 6, False: 42}
    while len(made) < 48:
        prompt = torch.randint(4, 64, (3 + len(made) % 5,), generator=g).tolist()
        held = is_held_out(Answered(np.array(prompt), len(prompt)))
        if sum(is_held_out(s) == held for s in made) < wanted[held]:
            made.append(Answered(np.array(generate_plain(target, prompt, 10 + len(made) % 12)), len(prompt)))
    return made
